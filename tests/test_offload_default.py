"""Whether what lies between blocks goes to the host where a run does not say so."""

from __future__ import annotations

import pytest

from cpfold_train.parallel.grid import Grid
from cpfold_train.plan.compose import compose
from cpfold_train.training.offload_default import between_blocks_bytes, with_default_offload

LARGE = ["model=boltz2", "crop_size=3072", "cp.grid=2x2", "trainer.precision=bf16-mixed"]
H100, MIB = 80e9, 2**20


def decided(*settings: str, grid: Grid = Grid(2, 2), device_bytes: float | None = H100) -> bool | None:  # noqa: B008
    return with_default_offload(compose([*LARGE, *settings]), grid, device_bytes).memory.offload


def test_tiles_between_blocks_are_counted():
    config = compose(LARGE)
    # A tile of 1,536 x 1,536 pairs and 128 channels in fp32, for 64 blocks and 4 of the MSA module.
    assert between_blocks_bytes(config, Grid(2, 2)) == 68 * 1152 * MIB
    confidence = compose([*LARGE, "loss.plddt=1e-4", "memory.blocks_at_once=4", "memory.residual=bf16"])
    assert between_blocks_bytes(confidence, Grid(2, 2)) == 76 * 1152 * MIB / 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), True),
        (("crop_size=1024",), False),
        (("memory.offload=false",), False),
        (("memory.blocks_at_once=8",), False),
        (("memory.recompute=false",), False),
        (("crop_size=1024", "memory.offload=true"), True),
    ],
)
def test_offload_by_size(settings, expected):
    assert decided(*settings) is expected


def test_on_cpu_the_tiles_are_on_the_host_already():
    assert decided(device_bytes=None) is None


def test_more_ranks_and_larger_gpus_need_none():
    assert decided(grid=Grid(4, 4)) is False
    assert decided(device_bytes=4 * H100) is False
