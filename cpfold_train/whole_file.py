"""Files that are there as a whole or not at all, whatever happens to the process or the disk that writes them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cpfold_train.errors import DiskFullError

PARTIAL = ".partial"
"""End of the name of a file that is being written."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write that takes the place of ``path`` when the block ends well; until then the old one stays.

    It is written beside ``path``, since only a rename within a file system is atomic, and is on the disk before it gets
    its name, so that not even a machine that loses power leaves half of it.

    Args:
        path: of the file; parent directories are made.
        mode: ``w`` or ``wb``.

    Raises:
        DiskFullError: where there is no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFullError(disk_full_sentence(path)) from error
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a directory."""
    for partial in folder.glob("*" + PARTIAL):
        partial.unlink(missing_ok=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error or one that it came from says that there is no room; torch raises others on top of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_sentence(path: Path) -> str:
    """What to tell the person whose disk is full."""
    while not path.parent.is_dir():
        path = path.parent
    usage = shutil.disk_usage(path.parent)
    return (
        f"the disk is full: {path} could not be written, {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB are "
        f"free in {path.parent}: make room, or write to another disk"
    )


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
