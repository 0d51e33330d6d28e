"""Runs of ``train.py`` and of the subcommands on ranks forked from a process that has imported everything.

Imports take longer than tiny runs.

The ranks get the environment that torchrun would give them, and as there, the first one that fails ends the others.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from cpfold_train.processes import end_process

ROOT = Path(__file__).parents[1]


class ForkedRuns:
    """Starts the server when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None

    def run(
        self, ranks: int, arguments: list[str], main: str = "cpfold_train.cli.train:main"
    ) -> subprocess.CompletedProcess:
        """``train.py``, or another ``MODULE:FUNCTION``, with these arguments on so many ranks; output and exit code as
        of one process."""
        if self._server is None:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.forked_runs"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
        self._server.stdin.write(json.dumps([ranks, arguments, main]) + "\n")
        self._server.stdin.flush()
        code, out, err = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out, err)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()


def serve() -> None:
    """Answer each line of standard input, ``[ranks, arguments, main]``, by ``[exit code, output, errors]``."""
    # Everything that a run imports at some point.
    import cpfold_train.cli.evaluate
    import cpfold_train.cli.run  # noqa: F401
    from cpfold_train.data.structures.components import component

    # Loads the dictionary of components.
    component("ALA")

    for line in sys.stdin:
        ranks, arguments, main = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = _run(ranks, arguments, main, out.fileno(), err.fileno())
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read(), err.read()]), flush=True)


def _run(ranks: int, arguments: list[str], main: str, out: int, err: int) -> int:
    from cpfold_train.parallel.rendezvous import open_rendezvous

    # A port that is only looked for can be taken by others before the ranks come to it.
    store = open_rendezvous()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    common |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_RUN_ID": store.port, "GROUP_RANK": 0}
    processes = set()
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            _rank(arguments, main, {**common, "RANK": rank, "LOCAL_RANK": rank}, out, err)
        processes.add(process)
    failed = 0
    while processes:
        process, status = os.wait()
        processes.discard(process)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for other in processes:
                os.kill(other, signal.SIGTERM)
    return failed


def _rank(arguments: list[str], main: str, env: dict[str, object], out: int, err: int) -> None:
    """Never returns."""
    module, function = main.split(":")
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.update({name: str(value) for name, value in env.items()})
    sys.argv = ["train.py", *arguments]
    code = 1
    try:
        code = getattr(importlib.import_module(module), function)() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # Not the server's own clean-up.
        end_process(code)


if __name__ == "__main__":
    serve()
