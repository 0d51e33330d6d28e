"""Ending a process without its exit handlers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import atexit
from multiprocessing.util import get_temp_dir
from cpfold_train.processes import end_process
atexit.register(print, "exit handlers")
print(get_temp_dir(), end="")
end_process(3)
"""


def test_what_was_said_is_written_and_no_folder_stays():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 3, done.stderr
    assert "pymp-" in done.stdout and "exit handlers" not in done.stdout
    assert not Path(done.stdout).exists()
