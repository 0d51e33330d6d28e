"""The tutorial and the notebook do what they say."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.test_training_runs import ROOT

TUTORIAL = runpy.run_path(str(ROOT / "docs" / "run_tutorial.py"))
SHORT = "trainer.max_steps=2 trainer.val_check_interval=2"
SMALLER = {
    "model=boltz2 crop_size=384": "model=quickstart crop_size=64",
    "trainer.max_steps=60 trainer.val_check_interval=30 trainer.log_every_n_steps=10": SHORT,
    "trainer.max_steps=40 trainer.val_check_interval=20 trainer.log_every_n_steps=10": SHORT,
    "resume my/tuned trainer.max_steps=80": "resume my/tuned trainer.max_steps=3",
    "--samples 2 --sampling-steps 20": "--samples 1 --sampling-steps 2 --recycling-steps 0 --max-msa-rows 8",
    "crop_size=64 trainer": "crop_size=24 data.max_msa_rows=8 data.num_workers=0 diffusion.validation_steps=2 trainer",
}
"""What makes the tutorial's commands quick."""
IN_A_NOTEBOOK = {
    "STEPS = 40": "STEPS = 2",
    'PLANNED = "boltz2"': 'PLANNED = "quickstart"',
    '"crop_size=64",': '"crop_size=24", "data.max_msa_rows=8", "data.num_workers=0", "diffusion.validation_steps=2",',
    "sampling_steps=20": "sampling_steps=2",
}


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    """Every command, and what it prints: each line of the page that has words and no numbers is printed."""
    page = TUTORIAL["PAGE"].read_text()
    assert all(old in page for old in SMALLER)
    for command, printed in TUTORIAL["run_all"](page, tmp_path, SMALLER):
        (shown,) = [text for typed, text in TUTORIAL["commands"](page) if typed == command]
        # Columns are as wide as their numbers.
        words = (" ".join(line.split()) for line in shown.splitlines() if re.search(r"[a-z]{4}", line))
        constant = [line for line in words if not re.search(r"\d|my/", line)]
        missing = [line for line in constant if line not in " ".join(printed.split())]
        assert len(missing) <= len(constant) / 4, (command, missing)
    assert (tmp_path / "my" / "tuned.ckpt").exists() and (tmp_path / "my" / "runs.png").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("nbclient", reason="type pip install -e '.[docs]'")
    notebook = runpy.run_path(str(ROOT / "docs" / "run_notebook.py"))
    cells = notebook["execute"](tmp_path, IN_A_NOTEBOOK).cells
    source = "\n".join(cell.source for cell in cells)
    assert all(new in source for new in IN_A_NOTEBOOK.values())
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("'completed', 3" in output.get("data", {}).get("text/plain", "") for output in outputs)
