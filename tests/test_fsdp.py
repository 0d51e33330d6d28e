"""Runs with ``parallel.fsdp=true`` against runs without, and their checkpoints."""

from __future__ import annotations

import gc
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.optim import AdamW

from cpfold_train.__main__ import main
from cpfold_train.checkpoints import sharded as sharded_checkpoint
from cpfold_train.checkpoints.boltz import read_checkpoint
from cpfold_train.checkpoints.load import AVERAGE, load_model
from cpfold_train.checkpoints.sharded import INDEX, load_sharded, remove_unfinished, save_sharded
from cpfold_train.config.check_checkpoint import check_checkpoints, checkpoint_to_resume
from cpfold_train.data.features.templates import Template, pack_templates
from cpfold_train.data.stream.shards import pack_arrays, write_shard
from cpfold_train.errors import ConfigError
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.sharding import own_part, shard, whole, world_mesh
from cpfold_train.training.fsdp import shard_model
from tests.test_config import compose
from tests.test_training_runs import ROOT, TINY, assert_same_curve, rows_of

LAST = "checkpoints/last.ckpt"
LOSSES = ("train/loss", "train/diffusion", "train/distogram", "train/pae", "grad_norm")
QUICK = (
    "trainer.num_sanity_val_steps=0",
    "trainer.gradient_clip_val=1",
    "diffusion.validation_steps=0",
    "data.max_templates=1",
)
NESTED = ("model.pairformer.num_blocks=3", "memory.blocks_at_once=2", "trainer.accumulate_grad_batches=1")
"""Blocks that are computed again within a group of blocks that is computed again."""


@pytest.fixture
def forked(forked_runs) -> Callable[..., list[dict[str, str]]]:
    def run(ranks: int, run_dir: Path, *arguments: str) -> list[dict[str, str]]:
        given = [*TINY, *QUICK, *arguments, f"hydra.run.dir={run_dir}"]
        return rows_of(forked_runs.run(ranks, given), run_dir)

    return run


def test_sharing_parameters_out_does_not_change_the_curve(forked, tmp_path):
    """A step on 3x1, the next on another grid with another number of ranks, and without FSDP from the file.

    Each step samples structures for the confidence module; validation takes averaged weights.
    """
    two = (*NESTED, "trainer.max_steps=2", "trainer.val_check_interval=2")
    expected = forked(1, tmp_path / "whole", *two, "cp.grid=1x1", "data.val=[]")
    one = (*NESTED, "trainer.max_steps=1", "data.val=[]", "cp.grid=3x1", "parallel.fsdp=true")
    assert_same_curve(forked(3, tmp_path / "a", *one), expected[:1], *LOSSES)
    checkpoint, file = tmp_path / "a" / LAST, tmp_path / "one.ckpt"
    assert main(["consolidate", str(checkpoint), str(file)]) == 0
    rows = forked(1, tmp_path / "file", *two, "cp.grid=1x1", "data.val=[]", f"ckpt_path={file}")
    assert_same_curve(rows, expected[1:], *LOSSES)
    rows = forked(2, tmp_path / "a", *two, "cp.grid=1x2", "parallel.fsdp=true", f"ckpt_path={checkpoint}")
    assert_same_curve(rows, expected, *LOSSES)
    assert rows[-1]["val/loss"]
    assert sum(x.numel() for x in load_model(file, AVERAGE).parameters()) > 0
    with pytest.raises(ConfigError, match=f"consolidate {checkpoint} OUT.ckpt"):
        read_checkpoint(checkpoint)


@pytest.mark.slow
def test_replicas_and_untrained_parts(forked, tmp_path):
    """Two replicas of one micro-batch each are one of two. Without its losses the confidence module has no gradient.

    The second step, of two micro-batches, goes on from the file of a run without FSDP.
    """
    untrained = [f"loss.{name}=0" for name in ("plddt", "resolved", "pde", "pae")] + ["data.val=[]"]
    expected = forked(1, tmp_path / "whole", *untrained, "cp.grid=1x1", "trainer.max_steps=2")
    forked(1, tmp_path / "a", *untrained, "cp.grid=1x1", "trainer.max_steps=1")
    replicas = ("dp=2", "trainer.accumulate_grad_batches=1", "parallel.fsdp=true")
    fresh = forked(4, tmp_path / "b", *untrained, *replicas, "cp.grid=1x2", "trainer.max_steps=1")
    assert_same_curve(fresh, expected[:1], *LOSSES[:3], "grad_norm", "tokens")
    other = ("cp.grid=2x1", "parallel.fsdp=true", f"ckpt_path={tmp_path / 'a' / LAST}", "trainer.max_steps=2")
    rows = forked(2, tmp_path / "c", *untrained, *other)
    assert_same_curve(rows, expected[1:], *LOSSES[:3], "grad_norm", "tokens")
    (optimizer,) = load_sharded(tmp_path / "c" / LAST, None)["optimizer_states"]
    assert 0 < len(optimizer["state"]) < sum(len(group["params"]) for group in optimizer["param_groups"])


@pytest.mark.slow
def test_replicas_with_different_numbers_of_templates(forked, tmp_path):
    """They gather equally often nevertheless: one sample of two has three templates, the other none."""
    draw = np.random.default_rng(0)

    def template() -> Template:
        n = 20
        vectors = draw.normal(size=(5, n, 3)).astype(np.float32)
        frames, known = vectors[:3].transpose(1, 0, 2), np.ones(n, bool)
        types = draw.integers(2, 20, n).astype(np.int8)
        return Template(np.arange(n, dtype=np.int32), types, frames, known, *vectors[3:], known)

    samples = {}
    with tarfile.open(ROOT / "tests/data/train-000000.tar") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    second = list(samples.values())[1]
    second["templates.npz"] = pack_arrays(pack_templates([template() for _ in range(3)]))
    write_shard(tmp_path / "with-000000.tar", samples.items())
    given = (f"data.train=[{tmp_path}/with-*.tar]", "data.max_templates=4", "data.augmentation.random_templates=false",
             "data.val=[]", "trainer.max_steps=2")  # fmt: skip
    expected = forked(1, tmp_path / "one", *given, "cp.grid=1x1", "trainer.accumulate_grad_batches=2")
    replicas = ("cp.grid=1x1", "dp=2", "trainer.accumulate_grad_batches=1", "parallel.fsdp=true")
    assert_same_curve(forked(2, tmp_path / "two", *given, *replicas), expected, *LOSSES)


def held(cp: ContextParallel, config: ModelConfig) -> tuple[int, int, int]:
    """Bytes of the tensors that a model and AdamW's state of it hold on this rank; of the parameters as they are
    sharded, padded to whole rows; and of all parameters."""
    # What earlier tests have left would be freed meanwhile, and its addresses used again.
    gc.collect()
    before = _storages()
    model = CoFolding(config, MemoryConfig())
    size = sum(p.nbytes for p in model.parameters())
    share = sum(-(-p.shape[0] // cp.grid.world_size) * p[0].nbytes for p in model.parameters())
    shard_model(model, cp)
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    after = _storages()
    return sum(after[place] for place in after.keys() - before.keys()), share, size


def _storages() -> dict[int, int]:
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    stores = (own_part(x).untyped_storage() for x in tensors)
    return {store.data_ptr(): store.nbytes() for store in stores}


def test_a_rank_holds_its_share_of_parameters_and_optimizer(ranks):
    config = OmegaConf.to_object(compose(*TINY).model)
    for held_bytes, share, size in ranks.run(held, 2, 2, config, dp=1):
        assert share < 0.3 * size
        assert 2.9 * share < held_bytes < 3.1 * share


def checkpoints(cp: ContextParallel, path: Path) -> list[list[float]]:
    """What is read after a whole checkpoint, after one that did not get to its end, and after another whole one."""
    mesh, found = world_mesh(cp), []
    publish = sharded_checkpoint._publish
    for value, stopped in ((1.0, False), (2.0, True), (3.0, False)):
        x = shard(torch.arange(3.0) * value, mesh)
        sharded_checkpoint._publish = (lambda *_: None) if stopped else publish
        save_sharded({"state": [{"x": x, 7: value}], "average": {"x": x}, "global_step": 0}, path)
        read = load_sharded(path, mesh)
        assert torch.load(path / INDEX, weights_only=False)["same"] == {"/average/x": "/state/0/x"}
        assert read["average"]["x"] is read["state"][0]["x"]
        read = read["state"][0]
        found.append([*whole(read["x"]).tolist(), read[7]])
    return found


def test_what_was_not_finished_is_not_read(ranks, tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_text("of a run without FSDP")
    for found in ranks.run(checkpoints, 2, 1, file):
        assert found == [[0, 1, 2, 1], [0, 1, 2, 1], [0, 3, 6, 3]]
    assert len([part for part in file.iterdir() if part.is_dir()]) == 1
    assert load_sharded(file, None)["state"][0]["x"].tolist() == [0, 3, 6]
    unfinished = tmp_path / "unfinished.ckpt"
    (unfinished / "shards-0").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"unfinished\.ckpt"):
        check_checkpoints(str(unfinished), None, True)
    check_checkpoints(str(file), None, True)
    with pytest.raises(ConfigError, match=r"parallel\.fsdp=true"):
        check_checkpoints(str(file), None, False)
    assert main(["consolidate", str(unfinished), str(tmp_path / "out")]) == 2


def test_last_is_the_last_that_is_complete(tmp_path):
    """What a killed run leaves of its first checkpoint is none, and is removed where there is a complete one."""

    def complete(name: str) -> Path:
        path = tmp_path / "checkpoints" / name
        (path / "shards-0").mkdir(parents=True)
        torch.save({"shards": "shards-0"}, path / INDEX)
        return path

    last = tmp_path / LAST
    assert checkpoint_to_resume("last", tmp_path) is None
    (last / "shards-1").mkdir(parents=True)
    assert checkpoint_to_resume("last", tmp_path) is None
    new = complete("last.ckpt.new")
    assert checkpoint_to_resume("last", tmp_path) == str(new)
    complete("last.ckpt")
    assert checkpoint_to_resume("last", tmp_path) == str(last)
    assert checkpoint_to_resume("other.ckpt", tmp_path) == "other.ckpt"
    remove_unfinished(tmp_path / "checkpoints")
    assert sorted(part.name for part in last.iterdir()) == [INDEX, "shards-0"]
