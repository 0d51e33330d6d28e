"""What a run does otherwise on GPUs, as far as a machine without one can tell."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn
from torch.distributed.utils import _to_kwargs
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from cpfold_train.cli import predict as command
from cpfold_train.data.schema import ON_HOST
from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.sampling import Source
from cpfold_train.errors import ConfigError
from cpfold_train.kernels import choice
from cpfold_train.ops import offload
from cpfold_train.ops.points import by_component, linear_of_points, turned
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.gather import on_any_rank
from cpfold_train.parallel.grid import Grid
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.training import gpus
from cpfold_train.training.optim import adamw_with_schedule
from cpfold_train.training.same_samples import check_same_samples
from cpfold_train.training.strategy import leave_out


def test_normal_draws_are_those_of_another_library():
    """CUDA has logarithms and cosines of its own, as numpy has: in fp64, and the same once rounded to fp32."""
    draws = RandomStreams(torch.tensor([5]))
    first, second = draws.uniform(0, 1 << 19).double().view(-1, 2).unbind(1)
    assert torch.equal(first * 2**24, (first * 2**24).round())
    expected = np.sqrt(-2 * np.log1p(-first.numpy())) * np.cos(2 * np.pi * second.numpy())
    assert torch.equal(draws.normal(0, 1 << 18)[0], torch.from_numpy(expected).float())


class Products(TorchDispatchMode):
    """Remembers the matrix products inside."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_what_says_how_much_is_sent_stays_on_the_host():
    """Whoever moves a batch: Lightning, and then DistributedDataParallel and FSDP. DataLoader made a tensor of it."""
    batch = next(iter(TileLoader([Source(["tests/data/*.tar"])], Grid(), crop_size=24, max_msa_rows=4)))
    there = torch.device("meta")
    moved = move_data_to_device(batch, there)
    ((moved,),), _ = _to_kwargs((moved,), {}, there, False)
    assert isinstance(moved[ON_HOST], np.ndarray) and np.array_equal(moved[ON_HOST], batch[ON_HOST])
    assert {x.device for x in moved.values() if isinstance(x, torch.Tensor)} == {there}


def test_points_are_multiplied_by_component():
    """With the values and gradients of a matrix product."""
    points = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    rotations = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    for ours, theirs, factor in (
        (by_component(points, weight.T), linear(points, weight), weight),
        (by_component(points, rotations), points @ rotations, rotations),
    ):
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn_like(theirs)
        for found, expected in zip(*(torch.autograd.grad(x, (points, factor), grad) for x in (ours, theirs))):
            torch.testing.assert_close(found, expected)


def test_a_gpu_makes_no_matrix_product_of_points():
    """Which could round them to TF32; on CPU it is one, as ever."""
    products = Products()
    with products:
        # No device but the CPU is taken for exact.
        points, weight = torch.empty(2, 5, 3, device="meta"), torch.empty(7, 3, device="meta")
        linear_of_points(points, weight, torch.empty(7, device="meta"))
        turned(points, torch.empty(2, 3, 3, device="meta"))
        assert not products.found
        linear_of_points(torch.empty(2, 5, 3), torch.empty(7, 3))
        turned(torch.empty(2, 5, 3), torch.empty(2, 3, 3))
    assert len(products.found) == 2


def test_pinned_memory_comes_in_pieces(monkeypatch):
    """None larger than a piece, whose size is a power of two and so not rounded up; and the tensor is the same."""
    assert offload.PIECE_BYTES & (offload.PIECE_BYTES - 1) == 0
    monkeypatch.setattr(offload, "PIECE_BYTES", 64)
    x = torch.randn(2, 3, 5, 7)
    for given in (x, x.transpose(1, 2)):
        kept = offload._Kept(given, None)
        assert len(kept._host) == 14 and max(piece.nbytes for piece in kept._host) == 64
        assert sum(piece.nbytes for piece in kept._host) == x.nbytes
        back = kept.take()
        assert torch.equal(back, given) and back.stride() == given.stride()


class OnGPU(nn.Parameter):
    is_cuda = True


@pytest.mark.parametrize(("kind", "fused"), [(nn.Parameter, None), (OnGPU, True)])
def test_adamw_is_fused_on_gpus(kind, fused):
    model = nn.ParameterDict({"matrix": kind(torch.ones(3, 3)), "vector": kind(torch.ones(3))})
    optimizer, _ = adamw_with_schedule(model, 1e-3, (0.9, 0.95), 1e-8, 0.0, lambda step: 1.0)
    assert [group["fused"] for group in optimizer.param_groups] == [fused] * 2


def test_defaults_are_set_where_the_user_has_not(monkeypatch):
    for name in (*gpus.DEFAULTS, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    gpus.set_up_gpus(tf32=True)
    assert {name: os.environ[name] for name in gpus.DEFAULTS} == gpus.DEFAULTS
    # What torch.compile reads must not raise.
    assert torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.get_float32_matmul_precision() == "high"
    gpus.set_up_gpus(tf32=False)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee" and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(monkeypatch, name):
    for other in (*gpus.DEFAULTS, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "0")
    gpus.set_up_gpus(tf32=False)
    named = {key: os.environ.get(key) for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    assert named == {key: "max_split_size_mb:512" if key == name else None for key in named}
    assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"


def compared_by_hosts(cp) -> tuple[bool, str]:
    """Whether a world of NCCL has a group of its own for the hosts, in which they compare samples, and its backend."""
    batch = {"id": ["a"], "num_tokens": torch.tensor([5]), "residue_index": torch.arange(5)[None]}
    real, dist.get_backend = dist.get_backend, lambda group=None: real(group) if group else "nccl"
    try:
        world = ContextParallel(cp.grid, timeout=timedelta(seconds=60))
    finally:
        dist.get_backend = real
    groups, gather = [], dist.all_gather
    dist.all_gather = lambda *args, group: groups.append(group) or gather(*args, group=group)
    try:
        check_same_samples(batch, world)
        any_rank = on_any_rank(world, cp.grid.rank == 2)
    finally:
        dist.all_gather = gather
    return any_rank and groups == [world.hosts] * 2 != [dist.group.WORLD] * 2, dist.get_backend(world.hosts)


def test_hosts_tell_each_other_where_gpus_are_busy(ranks):
    assert ranks.run(compared_by_hosts, 1, 2, dp=2) == [(True, "gloo")] * 4


def trained_without_a_part(cp, left_out: bool) -> tuple[torch.Tensor, bool]:
    """The gradient after two backward passes, and whether the other part has one."""
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    if left_out:
        leave_out(module, "unused")
    module.forward = lambda x: module["used"](x)
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        parallel(torch.tensor([[1.0, cp.grid.rank]])).sum().backward()
    return module["used"].weight.grad, module["unused"].weight.grad is not None


def test_a_part_without_a_loss_is_not_waited_for(ranks):
    for grad, other in ranks.run(trained_without_a_part, 1, 2, True):
        assert not other and torch.equal(grad, torch.tensor([[2.0, 1.0]]))
    with pytest.raises(AssertionError, match="Expected to have finished reduction"):
        ranks.run(trained_without_a_part, 1, 2, False)


def asked(**options: str) -> argparse.Namespace:
    return argparse.Namespace(**({"kernels": "auto", "precision": "32-true", "accelerator": "cpu"} | options))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernels": "triton"}, "--kernels auto"),
        ({"kernels": "triton", "precision": "64-true"}, "--kernels torch"),
    ],
)
def test_kernels_of_a_prediction_that_cannot_be(monkeypatch, options, sentence):
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=sentence):
        command._check_kernels(asked(**options))


def test_kernels_of_a_prediction(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cuequivariance_torch .*--kernels auto"):
        command._check_kernels(asked(kernels="cuequivariance"))
    for kernels in ("auto", "torch"):
        command._check_kernels(asked(kernels=kernels))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(["x.ckpt", "y.cif", "--out", "z"]).kernels == "auto"
