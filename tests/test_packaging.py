"""What an installed package has of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cpfold_train import __main__ as commands
from cpfold_train import __version__, paths
from cpfold_train.cli import train
from cpfold_train.paths import CONF

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_the_configuration(tmp_path):
    """Built from a copy, since building leaves folders beside the sources."""
    copy = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("cpfold_train/", "conf/", "recipes/")) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
    # Recipes are a group of the configuration, by a link.
    settings = {path.relative_to(ROOT) for path in CONF.resolve().rglob("*.yaml")}
    settings |= {Path("conf/recipe") / path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {f"cpfold_train/{path}" for path in settings} <= inside
    assert {name for name in files if name.startswith("cpfold_train/") and name.endswith(".py")} <= inside


def test_there_is_one_configuration():
    assert CONF.resolve() == ROOT / "conf"


def test_an_installed_package_starts_no_script_that_lies_beside_it(tmp_path, monkeypatch):
    assert paths.train_command() == [sys.executable, str(ROOT / "train.py")]
    (tmp_path / "train.py").touch()
    (tmp_path / "cpfold_train" / "conf").mkdir(parents=True)
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    monkeypatch.setattr(paths, "CONF", tmp_path / "cpfold_train" / "conf")
    assert paths.train_command() == [sys.executable, "-m", "cpfold_train.cli.start"]


@pytest.mark.parametrize("arguments", [["--version"], ["plan", "--version"], ["prepare", "--version"]])
def test_version_of_every_command(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        commands.main(arguments)
    assert (end.value.code, capsys.readouterr().out) == (0, f"cpfold-train {__version__}\n")


def test_version_of_train_is_not_hydras(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--version"])
    train.main()
    assert capsys.readouterr().out == f"cpfold-train {__version__}\n"
