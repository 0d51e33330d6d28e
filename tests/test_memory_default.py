"""What is kept for the backward pass, and where, where a run does not say so."""

from __future__ import annotations

import pytest

from cpfold_train import memory as machine
from cpfold_train.config.compose import compose
from cpfold_train.config.memory_default import Room, attention_bytes, between_blocks_bytes, with_default_memory
from cpfold_train.parallel.grid import Grid

LARGE = ["model=boltz2", "crop_size=3072", "cp.grid=2x2", "trainer.precision=bf16-mixed"]
H100, MIB = Room(80e9, 250e9, "triton"), 2**20


def decided(*settings: str, grid: Grid = Grid(2, 2), room: Room | None = H100) -> tuple[bool | None, bool | None]:  # noqa: B008
    memory = with_default_memory(compose([*LARGE, *settings]), grid, room).memory
    return memory.offload, memory.keep_attention


def test_what_is_kept_is_counted():
    config = compose(LARGE)
    # A tile of 1,536 x 1,536 pairs and 128 channels in fp32, for 64 blocks and 4 of the MSA module.
    assert between_blocks_bytes(config, Grid(2, 2)) == 68 * 1152 * MIB
    # As many channels in bf16, and four numbers in fp32, of two attentions for each of these and two a template.
    templates = 2 * config.data.max_templates
    assert attention_bytes(config, Grid(2, 2)) == 2 * (68 + templates) * (576 + 36) * MIB
    confidence = compose([*LARGE, "loss.plddt=1e-4", "memory.blocks_at_once=4", "memory.residual=bf16"])
    assert between_blocks_bytes(confidence, Grid(2, 2)) == 76 * 1152 * MIB / 8
    assert attention_bytes(confidence, Grid(2, 2)) == 2 * (76 + templates) * (576 + 36) * MIB


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (True, True)),
        # There, what attention gave takes longer to the host than it takes to compute.
        (("crop_size=2048", "cp.grid=1x2"), (True, False)),
        (("crop_size=1024",), (False, True)),
        (("crop_size=1536",), (False, False)),
        (("memory.offload=false",), (False, False)),
        (("memory.keep_attention=false",), (True, False)),
        (("memory.blocks_at_once=8",), (False, False)),
        (("memory.recompute=false",), (False, False)),
        (("crop_size=1024", "memory.offload=true"), (True, False)),
        (("crop_size=1024", "memory.offload=true", "memory.keep_attention=true"), (True, True)),
    ],
)
def test_by_size(settings, expected):
    grid = Grid(1, 2) if "cp.grid=1x2" in settings else Grid(2, 2)
    assert decided(*settings, grid=grid) == expected


def test_on_cpu_nothing_is_decided():
    assert decided(room=None) == (None, None)


def test_by_what_a_rank_has():
    assert decided(grid=Grid(6, 6)) == (False, True)
    assert decided(room=H100._replace(device_bytes=8 * 80e9)) == (False, True)
    assert decided(room=H100._replace(host_bytes=200e9)) == (True, False)
    # Its kernels keep what they like.
    assert decided(room=H100._replace(kernels="cuequivariance")) == (True, False)


def test_memory_of_the_host_is_what_the_control_group_allows(monkeypatch, tmp_path):
    whole = machine.host_bytes_in_all()
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (tmp_path / "fs" / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_GROUP_ROOT", tmp_path / "fs")
    assert machine.host_bytes_in_all() == whole
    (tmp_path / "fs" / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "fs" / "job" / "memory.max").write_text("1048576\n")
    assert machine.host_bytes_in_all() == MIB
