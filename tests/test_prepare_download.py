"""Downloads, from a server on this machine that misbehaves as servers do."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cpfold_train.__main__ import main
from cpfold_train.data.prepare.download import download, fetch
from cpfold_train.errors import DataError
from tests.structures import write_tiny

CONTENT = gzip.compress(bytes(range(256)) * 4000, mtime=0)


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``; what ``server.faults`` lists for a name happens to its requests, one after another."""

    def do_GET(self):
        name, server = self.path.strip("/"), self.server
        server.requests.append((name, self.headers.get("Range")))
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if name not in server.files or isinstance(fault, int):
            self.send_error(fault or 404)
            return
        data, start = server.files[name], 0
        if self.headers.get("Range") and fault != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
        body = bytes(len(data)) if fault == "damaged" else data
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(body[start : start + 100 if fault == "cut off" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests = {"1abc.cif.gz": CONTENT}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [None]),
        (["cut off"], [None, "bytes=100-"]),
        (["cut off", "cut off"], [None, "bytes=100-", "bytes=200-"]),
        (["cut off", "no ranges"], [None, "bytes=100-"]),
        ([503, 429], [None, None, None]),
        (["damaged"], [None, None]),
    ],
)
def test_a_file_arrives_whole(server, tmp_path, faults, ranges):
    server.faults["1abc.cif.gz"] = faults
    path = fetch(f"{server.url}/1abc.cif.gz", tmp_path / "1abc.cif.gz", pause=0.01)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ranges
    assert [file.name for file in tmp_path.iterdir()] == ["1abc.cif.gz"]
    fetch(f"{server.url}/1abc.cif.gz", path)
    assert len(server.requests) == len(ranges)


def test_parts_of_an_interrupted_run(server, tmp_path):
    """A part is continued; one that is no beginning of the file, or longer than it, is thrown away."""
    for part, ranges in [
        (CONTENT[:500], ["bytes=500-"]),
        (bytes(500), ["bytes=500-", None]),
        (CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
    ]:
        server.requests.clear()
        (tmp_path / "x.gz.part").write_bytes(part)
        path = fetch(f"{server.url}/1abc.cif.gz", tmp_path / "x.gz", pause=0.01)
        assert path.read_bytes() == CONTENT and [asked for _, asked in server.requests] == ranges
        path.unlink()


def test_giving_up(server, tmp_path):
    with pytest.raises(DataError, match=r"9zzz\.cif\.gz .*404"):
        fetch(f"{server.url}/9zzz.cif.gz", tmp_path / "9zzz.cif.gz", pause=0.01)
    assert len(server.requests) == 1
    server.faults["1abc.cif.gz"] = ["damaged"] * 9
    with pytest.raises(DataError, match=r"1abc\.cif\.gz .*\b5\b"):
        fetch(f"{server.url}/1abc.cif.gz", tmp_path / "1abc.cif.gz", pause=0.01)
    assert list(tmp_path.iterdir()) == []


def test_several_at_a_time(server, tmp_path):
    names = [f"{i}abc" for i in range(1, 10)]
    server.files = {f"{name}.cif.gz": gzip.compress(name.encode()) for name in names[:-1]}
    paths, failed = download(names[::-1], tmp_path / "new", f"{server.url}/")
    assert list(paths) == names[:-1] and list(failed) == names[-1:]
    assert all(gzip.decompress(path.read_bytes()) == name.encode() for name, path in paths.items())


def test_prepare_downloads(server, tmp_path, capsys):
    """Ids instead of files, in a list or typed; what cannot be had is dropped and told."""
    server.files = {"1abc.cif.gz": gzip.compress(write_tiny(tmp_path / "tiny.cif").read_bytes())}
    (tmp_path / "list.txt").write_text("# ids and files\n1ABC\ntiny.cif\n")
    out, kept = tmp_path / "out", tmp_path / "kept"
    options = ["--min-residues", "4", "--workers", "1"]
    inputs = ["prepare", str(tmp_path / "list.txt"), "9zzz,1abc", str(out), *options]
    assert main(inputs) == 2
    assert "--download DIR" in capsys.readouterr().err
    assert main([*inputs, "--download", str(kept), "--source", server.url]) == 0
    report = json.loads((out / "report.json").read_text())
    entries = {entry["key"]: entry.get("dropped") for entry in report["entries"]}
    assert entries == {"1abc": None, "tiny": None, "9zzz": f"{server.url}/9zzz.cif.gz cannot be fetched: 404 Not Found"}
