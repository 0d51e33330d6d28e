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
from cpfold_train.config.composition import typed_config
from cpfold_train.config.sources import training_sources, validation_source
from cpfold_train.data.stream.sampling import open_source
from cpfold_train.data.stream.shards import read_indices
from cpfold_train.errors import ConfigError
from cpfold_train.paths import CONF, DATA
from tests.test_config import compose

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_the_configuration(tmp_path):
    """Built from a copy, since building leaves folders beside the sources."""
    copy = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("cpfold_train/", "conf/", "data/", "recipes/")) or "/" not in name:
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
    shards = {
        f"cpfold_train/example_data/shards/{kind}-000000.{ext}"
        for kind in ("train", "val")
        for ext in ("tar", "index.npz")
    }
    assert shards <= inside
    assert {name for name in files if name.startswith("cpfold_train/") and name.endswith(".py")} <= inside


def test_there_is_one_configuration():
    assert CONF.resolve() == ROOT / "conf"
    assert DATA == ROOT / "data"


def test_the_default_data_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = typed_config(compose()).data
    for source in (*training_sources(data), validation_source(data)):
        assert open_source(source).first[-1]
    with pytest.raises(ConfigError, match=f"data/shards/x.tar in {tmp_path}, where the command was typed: type"):
        read_indices(["data/shards/x.tar"])


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
