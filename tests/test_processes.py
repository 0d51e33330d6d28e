"""Ending a process without its exit handlers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import atexit
from multiprocessing.util import get_temp_dir
from cpfold_train.processes import end_process
atexit.register(print, "exit handlers")
print(get_temp_dir(), end="")
end_process(3)
"""


OF_A_PARENT = """
import multiprocessing, os
from multiprocessing.util import get_temp_dir
from cpfold_train.processes import end_process
folder = get_temp_dir()
child = multiprocessing.get_context("fork").Process(target=end_process, args=(0,))
child.start()
child.join()
assert os.path.isdir(folder)
"""


def test_what_was_said_is_written_and_no_folder_stays():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    assert "pymp-" in done.stdout and "exit handlers" not in done.stdout
    assert not Path(done.stdout).exists()


def test_the_folder_of_a_parent_stays():
    done = subprocess.run([sys.executable, "-c", OF_A_PARENT], text=True, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
