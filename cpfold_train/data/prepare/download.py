"""Fetch entries of the Protein Data Bank."""

from __future__ import annotations

import gzip
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.progress import track

from cpfold_train.errors import DataError

WWPDB = "https://files.wwpdb.org/download"
CONNECTIONS = 8
TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""

_TRIES = 5
_PAUSE = 1.0
_BLOCK = 1 << 16
_PASSING = (408, 425, 429, 500, 502, 503, 504)


def download(ids: list[str], folder: Path, url: str = WWPDB) -> tuple[dict[str, Path], dict[str, str]]:
    """Fetch ``URL/ID.cif.gz`` into a folder, several at a time; what is there already is not fetched again.

    Returns:
        Paths by id, and reasons by id of those that could not be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, failed = {}, {}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        jobs = {pool.submit(fetch, f"{url.rstrip('/')}/{name}.cif.gz", folder / f"{name}.cif.gz"): name for name in ids}
        for job in track(as_completed(jobs), "downloading", total=len(jobs), transient=True):
            try:
                paths[jobs[job]] = job.result()
            except DataError as error:
                failed[jobs[job]] = str(error)
    return dict(sorted(paths.items())), dict(sorted(failed.items()))


def fetch(url: str, path: Path, pause: float = _PAUSE) -> Path:
    """Fetch one gzipped file. A part left by an interrupted run is continued; the whole is checked by gzip's own sum.

    Args:
        pause: seconds before the second try; each further pause is twice as long.

    Raises:
        DataError: the server does not have it, or several tries failed.
    """
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _receive(url, part)
            _check(part)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is as long as the file, or longer: it did not pass the check
                part.unlink(missing_ok=True)
            elif error.code not in _PASSING:
                raise DataError(f"{url} cannot be fetched: {error.code} {error.reason}") from error
            problem = error
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            part.unlink(missing_ok=True)
            problem = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        else:
            part.replace(path)
            return path
    raise DataError(f"{url} cannot be fetched after {_TRIES} tries: {problem}") from problem


def _receive(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        # A server that knows no ranges answers 200 and sends all of it.
        with part.open("ab" if response.status == 206 else "wb") as file:
            shutil.copyfileobj(response, file, _BLOCK)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)


def _check(path: Path) -> None:
    with gzip.open(path) as file:
        while file.read(_BLOCK):
            pass
