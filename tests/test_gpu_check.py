"""gpu-check: all phases small on a CPU, and that what goes wrong in one is told and takes no other with it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cpfold_train.__main__ import main
from cpfold_train.cli import gpu_check as command
from cpfold_train.devices import find_device
from cpfold_train.gpu_check import exactness
from cpfold_train.gpu_check.apart import run_apart
from cpfold_train.gpu_check.phases import PHASES, Phase
from cpfold_train.gpu_check.ranks import ThroughHost, compare_ranks
from cpfold_train.gpu_check.record import Record
from cpfold_train.gpu_check.roofline import H100, floors, least_seconds
from cpfold_train.gpu_check.scope import ON_CPU
from cpfold_train.gpu_check.step import largest_crop, next_crop
from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel import exchange_plan
from cpfold_train.parallel.grid import Grid
from cpfold_train.testing.cases import CASES
from cpfold_train.testing.parity import run


def test_all_phases_on_a_cpu(tmp_path):
    assert main(["gpu-check", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert list(results["phases"]) == list(PHASES)
    for name, found in results["phases"].items():
        assert found["status"] == "passed" and found["entries"] and not found["left_out"], name
    entries = {name: found["entries"] for name, found in results["phases"].items()}
    assert set(ON_CPU.cases) <= entries["parity"].keys() & entries["ranks"].keys()
    assert all(0 < entries["precision"][name]["gradient of z"] < 3e-2 for name in entries["precision"])
    block = entries["blocks"]["pairformer_block, torch, bf16-mixed"]
    assert block["trained_ms"] > block["forward_ms"] > 0 and block["launches"] > 100 and block["kernels"]
    assert entries["step"]["measured"]["step_s"] > 0 and entries["largest"]["largest"]["crop_size"] == 16
    table = (tmp_path / "gpu-check.md").read_text()
    assert "| training step |" in table and "### cpu" in table
    # What a plan takes as a device.
    device = find_device(str(tmp_path / "gpu-check.json"), 1)
    assert device.measured.bf16_flops == results["rates"]["bf16_flops"] > 0
    assert device.memory == results["device"]["memory_bytes"]


def a_phase(run) -> Phase:
    return Phase("a phase", 1, run)


def test_a_phase_that_fails_or_hangs_takes_no_other(tmp_path, monkeypatch, capsys):
    def hang(record, scope, known):
        record.add("before", x=1)
        time.sleep(60)

    def crash(record, scope, known):
        record.attempt("bad", lambda: 1 / 0)
        record.add("good", x=2)

    def die(record, scope, known):
        torch.os._exit(7)

    monkeypatch.setattr("cpfold_train.gpu_check.apart.GRACE_S", 0.1)
    phases = {"hangs": a_phase(hang), "crashes": a_phase(crash), "dies": a_phase(die)}
    phases["works"] = a_phase(lambda record, scope, known: record.add("last", x=3))
    monkeypatch.setattr(command, "PHASES", phases)
    monkeypatch.setattr("cpfold_train.gpu_check.report.PHASES", phases)
    assert main(["gpu-check", "--device", "cpu", "--minutes", "0.05", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "hangs, crashes, dies" in told.err
    found = json.loads((tmp_path / "gpu-check.json").read_text())["phases"]
    assert found["hangs"]["entries"] == {"before": {"x": 1}}
    assert len(found["hangs"]["failures"]) == 1
    assert found["crashes"]["entries"] == {"good": {"x": 2}}
    assert found["crashes"]["failures"] == ["bad: ZeroDivisionError: division by zero"]
    assert "7" in found["dies"]["failures"][0]
    assert found["works"]["status"] == "passed"
    assert "ZeroDivisionError" in (tmp_path / "crashes.log").read_text()


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    def work(record):
        record.attempt("short", lambda: record.add("short", x=1), seconds=1)
        record.attempt("long", lambda: record.add("long", x=1), seconds=1000)

    assert run_apart(work, tmp_path / "found.json", tmp_path / "log", 100, lambda: None) is None
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["entries"] == {"short": {"x": 1}} and found["left_out"] == ["long"]


def test_errors_beyond_the_limit_fail(tmp_path, monkeypatch):
    """A device that gives something else: here the same device, with one gradient changed."""
    calls = []

    def slightly_wrong(cp, case):
        found = run(cp, case)
        calls.append(case)
        if len(calls) % 2 == 0:
            next(iter(found["inputs"].values())).mul_(1 + 1e-7)
        return found

    monkeypatch.setattr(exactness, "run", slightly_wrong)
    scope = replace(ON_CPU, cases=("distogram head",))

    def compare(record):
        exactness.compare_with_cpu(record, scope)

    assert run_apart(compare, tmp_path / "found.json", tmp_path / "log", 60, lambda: None) is None
    (failure,) = json.loads((tmp_path / "found.json").read_text())["failures"]
    assert re.match("distogram head: .*gradient of z .*1.0e-07", failure)


def test_ranks_that_do_not_work_are_told(tmp_path, monkeypatch):
    broken = dict(CASES)
    broken["distogram head"] = replace(CASES["distogram head"], placements={"z": "nowhere"})
    monkeypatch.setattr("cpfold_train.gpu_check.ranks.CASES", broken)
    scope = replace(ON_CPU, cases=("distogram head",))
    record = Record(tmp_path / "ranks.json", time.monotonic() + 60)
    compare_ranks(record, scope, 1)
    assert "KeyError" in record.found["failures"][0]


def through_host(cp) -> dict:
    original, exchange_plan.Exchange = exchange_plan.Exchange, ThroughHost
    try:
        return run(cp, CASES["TriangleAttentionEndingNode, ring"])
    finally:
        exchange_plan.Exchange = original


def test_messages_through_the_host_change_nothing(ranks):
    expected = ranks.run(run, 1, 3, CASES["TriangleAttentionEndingNode, ring"])
    for found, direct in zip(ranks.run(through_host, 1, 3), expected):
        torch.testing.assert_close(found, direct, rtol=0, atol=0)


def test_floors_are_those_of_an_h100():
    """One rank of 2x2 at 3,072 tokens and 1,024 sequences, by hand."""
    of = floors(ModelConfig(), 3072, 1024, Grid(2, 2))
    forward, backward = of["triangle_attention_start"]
    assert forward.exps == 768 * 4 * 3072**2
    assert forward.bf16 == 4 * forward.exps * 32 + 2 * 1536**2 * 128 * (512 + 128)
    assert forward.bound(H100) == "exponentials" and forward.seconds(H100) == pytest.approx(8.05e-3, rel=1e-3)
    assert backward.bound(H100) == "matrix units" and backward.seconds(H100) == pytest.approx(14.9e-3, rel=1e-2)
    once, trained = least_seconds("pairformer_block", of, H100)
    assert once == pytest.approx(24.6e-3, rel=1e-2) and trained == pytest.approx(98.2e-3, rel=1e-2)
    # A quarter of the work of one rank alone, but for the single track, which each rank has whole.
    alone = floors(ModelConfig(), 3072, 1024, Grid())
    assert alone["triangle_multiplication"][0].bf16 == 4 * of["triangle_multiplication"][0].bf16


def test_the_crop_to_try_next():
    crops = tuple(range(256, 4097, 128))
    assert next_crop(0, float("inf"), crops) == 256
    assert next_crop(512, float("inf"), crops) == 1024
    assert next_crop(1024, 2048, crops) == 1536
    assert next_crop(1408, 1536, crops) == 0 and next_crop(4096, float("inf"), crops) == 0
    small = SimpleNamespace(parameters=10**9, peak=16e9 + 1e9, memory=80e9, config=SimpleNamespace(crop_size=256))
    # 56 GB are left for tokens, 56 times what 256 need: sqrt(56) x 256 = 1,915.
    assert largest_crop(small, crops) == 1792


def test_refusals(tmp_path, capsys):
    assert main(["gpu-check", "--only", "speed", "--out", str(tmp_path)]) == 2
    assert "--only machine" in capsys.readouterr().err
    assert main(["gpu-check", "--minutes", "0", "--out", str(tmp_path)]) == 2
    assert "--minutes 10" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["gpu-check", "--out", str(tmp_path)]) == 2
        assert "--device cpu" in capsys.readouterr().err
