"""The Triton kernels, compiled without a GPU: no spills, room on a multiprocessor, no atomics.

Compilation is for a process without the interpreter, in which other tests run the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpfold_train.__main__ import main
from cpfold_train.kernels.compiled import ARCHITECTURES, Compiled, inner_loop, occupancy

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def compile_elsewhere(*command: str) -> list[dict]:
    """What a module prints as JSON; what was compiled once is kept with the machine's temporary files."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "cpfold-train-triton")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ARCHS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
"""And the instructions of their matrix units."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_fit_a_multiprocessor(arch):
    found = compile_elsewhere("cpfold_train", "kernels", "--arch", arch, "--json")
    assert len(found) > 30
    check_fit(found, arch)


def test_kernels_fit_a_multiprocessor():
    """Some of those that take most of the time of a step, at the widths of the pair stack."""
    found = compile_elsewhere("cpfold_train", "kernels", "--only", "width 32,transition forward", "--json")
    names = " ".join(kernel["kernel"] for kernel in found)
    assert all(part in names for part in ("keys", "queries", "gradient of the bias", "transition"))
    check_fit(found, "sm_90")


def check_fit(found: list[dict], arch: str) -> None:
    for kernel in found:
        name = kernel["kernel"]
        assert kernel["stores_spilled"] == kernel["loads_spilled"] == 0, name
        assert kernel["fsdp_bytes"] <= ARCHITECTURES[arch].shared_block, name
        assert kernel["blocks"] >= 1, name
        assert kernel["atomics"] == 0, name


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in ARCHS])
def test_what_is_known_of_small_kernels(arch):
    product, summed, wide = compile_elsewhere("tests.small_kernels", arch)
    assert product["matrix"].keys() == {ARCHS[arch]} and product["exponentials"] >= 32
    assert 0 < product["loop"] < 300 and product["stores_spilled"] == product["atomics"] == 0
    assert product["fsdp_bytes"] >= 2 * 64 * 64 * 2 and product["blocks"] >= 2
    assert summed["atomics"] == 1 and summed["loop"] == 0 and not summed["matrix"]
    assert wide["stores_spilled"] > 100 and wide["loads_spilled"] > 100


def test_tables(capsys, monkeypatch):
    kernel = Compiled("k", "sm_90", 4, 168, 1, 2, 2048, 3, "registers", {"HGMMA": 4}, 32, 0, 99)
    monkeypatch.setattr("cpfold_train.cli.kernels.require_compiler", lambda arch: None)
    monkeypatch.setattr("cpfold_train.cli.kernels.launches", lambda arch: [SimpleNamespace(name="k")])
    monkeypatch.setattr("cpfold_train.cli.kernels.compiled", lambda launch, arch: kernel)
    assert main(["kernels", "--markdown"]) == 0
    assert "| k | 4 | 168 | 1+2 | 2 | 3 | 4 HGMMA | 32 | 0 | 99 |" in capsys.readouterr().out
    assert main(["kernels"]) == 0
    assert "4 HGMMA" in capsys.readouterr().out
    assert main(["kernels", "--only", "other"]) == 2
    assert "--only" in capsys.readouterr().err


def test_occupancy_by_the_scarcest():
    hopper = ARCHITECTURES["sm_90"]
    assert occupancy(hopper, 168, 0, 4) == (3, "registers")
    assert occupancy(hopper, 32, 100 * 1024, 4) == (2, "shared memory")
    assert occupancy(hopper, 32, 228 * 1024, 4) == (0, "shared memory")
    assert occupancy(hopper, 16, 0, 8) == (8, "warps")
    assert occupancy(hopper, 16, 0, 1) == (32, "blocks")
    assert occupancy(ARCHITECTURES["sm_100"], 64, 0, 4, columns=256) == (2, "tensor memory")


def test_the_loop_that_does_the_work():
    names = ["MOV", "FADD", "HGMMA.64x64x16", "MUFU.EX2", "BRA", "HGMMA.64x64x16", "BRA", "BRA"]
    assert inner_loop(names, [None, None, None, None, 1, None, 5, 7]) == 4
    assert inner_loop(names, [None, None, None, None, None, None, 5, None]) == 2
    assert inner_loop(names, [None] * 8) == 0


def test_the_loop_of_the_most_exponentials_does_the_work():
    """Not the one that takes the last block, nor the one around it."""
    once, twice = ["HGMMA.64x64x16", "MUFU.EX2", "BRA"], ["HGMMA.64x64x16", "MUFU.EX2", "FADD", "MUFU.EX2", "BRA"]
    assert inner_loop(["MOV", *twice, *once, "BRA"], [None, *[None] * 4, 1, *[None] * 2, 6, 0]) == 5


def test_refusals(capsys, monkeypatch):
    assert main(["kernels", "--arch", "sm_75"]) == 2
    assert "--arch sm_80" in capsys.readouterr().err
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main(["kernels"]) == 2
    assert "env -u TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr("cpfold_train.kernels.compiled._path", lambda tool: (_ for _ in ()).throw(RuntimeError))
    assert main(["kernels"]) == 2
    assert "TRITON_CUOBJDUMP_PATH=PATH" in capsys.readouterr().err
    monkeypatch.setattr("cpfold_train.kernels.compiled.find_spec", lambda _: None)
    assert main(["kernels"]) == 2
    assert "pip install triton" in capsys.readouterr().err
