"""What a command says of itself, and what a shell completes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cpfold_train.__main__ import SUBCOMMANDS
from cpfold_train.__main__ import main as command
from cpfold_train.cli import train
from cpfold_train.config import help as of_train
from cpfold_train.paths import CONF


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_train_is_about_training(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["train.py", option])
    train.main()
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    for word in ("crop_size=96", "cp.grid=2x2", "trainer.max_steps=150", "recipe=NAME", "--hydra-help", "runs/mine"):
        assert word in told
    assert all(path.stem in told for path in (CONF / "recipe").glob("*.yaml"))
    assert "${" not in told and "Powered by Hydra" not in told


def test_keys_of_the_help_are_there():
    keys = of_train._keys()
    assert all(keys[key][1] for shown in of_train._GROUPS.values() for key in shown)


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    typed = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _cpfold_train; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_keys(capsys):
    assert command(["completion"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "cpfold-train", "pre") == ["prepare", "predict"]
    assert set(completed(script, "cpfold-train", "")) == set(SUBCOMMANDS)
    assert completed(script, "cpfold-train", "predict", "--over") == ["--overwrite"]
    assert completed(script, "cpfold-train", "train", "trainer.max_s") == ["trainer.max_steps="]
    assert completed(script, "cpfold-train", "plan", "gpu") == ["gpus="]


@pytest.mark.slow
def test_hydra_completes_values_of_train():
    """By ``eval "$(python train.py -sc install=bash)"``, which asks it this."""
    line = "python train.py optim="
    done = subprocess.run(
        [sys.executable, "train.py", "-sc", "query=bash"],
        env={"COMP_LINE": line, "COMP_POINT": str(len(line)), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert {"optim=af3", "optim=quickstart"} <= set(done.stdout.split()), done.stderr
