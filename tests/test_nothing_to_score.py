"""Crops that say nothing: without a resolved atom they are replaced, without a pair they do not count in a mean."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpfold_train.data.stream import loader
from cpfold_train.data.stream.batch import Crop
from cpfold_train.data.stream.quarantine import read_quarantine
from cpfold_train.data.stream.sampling import Source
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.reports.metrics import VALIDATION
from cpfold_train.training.module import CoFoldingModule
from tests.golden.case import CONFIG, DRAWN, OPTIM, SEED, WEIGHTS, crops, features, weights

SCORES = ("val/distogram", "val/contact_precision", "val/distance_lddt", "val/structure_lddt")


@pytest.mark.parametrize("shuffle", [True, False], ids=["training", "validation"])
def test_a_crop_without_resolved_atoms_is_quarantined(tmp_path, monkeypatch, shuffle):
    make, path = loader.make_crop, tmp_path / "quarantine.jsonl"

    def unresolved(structure, *rest, **settings):
        crop = make(structure, *rest, **settings)
        return with_known(crop, 0) if structure.meta["id"] == "1kd8" else crop

    monkeypatch.setattr(loader, "make_crop", unresolved)
    settings = {"crop_size": 32, "max_msa_rows": 4, "max_bad_share": 0.5, "shuffle": shuffle, "quarantine": path}
    batches = loader.TileLoader([Source(["data/shards/train-000000.tar"])], Grid(), **settings)
    found = [(batch["id"][0], bool(batch["filler"])) for batch in batches]
    assert "1kd8" not in {key for key, _ in found}
    assert sum(filler for _, filler in found) == batches.quarantined == 1
    (line,) = read_quarantine(path)
    assert line["key"] == "1kd8" and "no atom of a crop of 32 tokens is resolved" in line["reason"]


def validation(cp, known: list[int | None]) -> tuple[dict[str, float], str]:
    """Means of a validation of crops of which only so many tokens are resolved, None for all; and what is told."""
    drawn = replace(DRAWN, validation_steps=2)
    module = CoFoldingModule(CONFIG, MemoryConfig(), OPTIM, WEIGHTS, drawn, SEED)
    module.model.load_state_dict(weights())
    module = module.double().eval()
    zero = cp.grid.rank == 0
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(cp=cp), global_step=0, is_global_zero=zero)
    module.log_dict = lambda *args, **kwargs: None
    module.on_validation_epoch_start()
    for crop, tokens in zip(crops(), known):
        batch = features([crop if tokens is None else with_known(crop, tokens)], cp.grid, torch.float64)
        with torch.no_grad():
            module.validation_step(batch | {"filler": torch.zeros(1, dtype=torch.bool)}, 0)
    with redirect_stderr(StringIO()) as told:
        module.on_validation_epoch_end()
    return module.validation, told.getvalue()


def with_known(crop: Crop, tokens: int) -> Crop:
    resolved = np.zeros_like(crop.structure.resolved)
    for token in crop.tokens[:tokens]:
        resolved[slice(*crop.structure.atom_start[token : token + 2])] = True
    return replace(crop, structure=replace(crop.structure, resolved=resolved))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_a_crop_without_pairs_is_left_out_of_the_means(ranks, grid):
    (both, told), *_ = ranks.run(validation, *grid, [None, None])
    assert set(both) >= {*SCORES} and told == ""
    (first, _), *_ = ranks.run(validation, *grid, [None])
    ((mixed, told), *others) = ranks.run(validation, *grid, [None, 1])
    for name in SCORES:
        assert mixed[name] == pytest.approx(first[name], rel=1e-9) and first[name] > 0, name
        assert f"1 of {name}" in told
    assert told.startswith("of 2 crops ") and all(text == "" for _, text in others)
    assert mixed["val/loss"] != pytest.approx(first["val/loss"], rel=1e-3), "its loss counts"


def test_what_no_crop_has_pairs_for_is_not_measured(ranks):
    ((found, told),) = ranks.run(validation, 1, 1, [1])
    assert [*found] == [name for name in VALIDATION if name in found and name not in SCORES] and "val/loss" in found
    assert told.count("1 of val/") == len(SCORES)
