"""What the compiler makes of the Triton kernels, for any NVIDIA architecture and without a GPU.

Triton compiles for a target that need not be there, and its package brings NVIDIA's ``cuobjdump`` and ``nvdisasm``,
which read registers, shared memory and instructions off the result. That shows spills, how many blocks a multiprocessor
holds, whether matrix units are used and whether gradients are summed by atomics; it shows no times.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cpfold_train.errors import ConfigError

if TYPE_CHECKING:
    from cpfold_train.kernels.triton.launches import Launch

KIB = 1024
WARP = 32
REGISTERS = 65536
"""Of a multiprocessor, on all architectures below; a warp gets them in units of 256."""
RESERVED_SHARED = 1 * KIB
"""Shared memory that the driver takes for each block."""
TENSOR_COLUMNS = 512
"""Columns of a multiprocessor's tensor memory, from Blackwell on."""


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor holds (CUDA C++ Programming Guide, technical specifications by compute capability).

    Attributes:
        shared: bytes of shared memory.
        shared_block: the most of it that a block can use.
        warps, blocks: the most that it runs at a time.
    """

    shared: int
    shared_block: int
    warps: int
    blocks: int


ARCHITECTURES = {
    "sm_80": Architecture(164 * KIB, 163 * KIB, 64, 32),
    "sm_86": Architecture(100 * KIB, 99 * KIB, 48, 16),
    "sm_89": Architecture(100 * KIB, 99 * KIB, 48, 24),
    "sm_90": Architecture(228 * KIB, 227 * KIB, 64, 32),
    "sm_100": Architecture(228 * KIB, 227 * KIB, 64, 32),
}
"""A100; A10, A40 and RTX 30; L40S and RTX 40; H100 and H200; B200."""

MATRIX = re.compile(r"(HMMA|HGMMA|QMMA|QGMMA|OMMA|UTC\w+MMA)\b")
"""Products on matrix units: HMMA up to Ada and of a warp, HGMMA on Hopper, UTCHMMA on Blackwell; Q and O are fp8's."""
ATOMIC = re.compile(r"(ATOM|ATOMG|RED|REDG)\b")
"""On global memory. Those on shared memory (ATOMS) synchronise the warps of a block."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled.

    Attributes:
        kernel: name of the kernel and the case.
        arch: as ``sm_90``.
        warps: of a block.
        registers: of a thread.
        stores_spilled, loads_spilled: instructions that write registers to local memory and read them back.
        fsdp_bytes: of a block, that of the launch included.
        blocks: that fit a multiprocessor, by registers, shared memory and warps.
        bound: which of them is the limit.
        matrix: instructions of matrix units, by name.
        exponentials, atomics: instructions.
        loop: instructions of the innermost loop that does the work (:func:`inner_loop`); 0 where there is none.
    """

    kernel: str
    arch: str
    warps: int
    registers: int
    stores_spilled: int
    loads_spilled: int
    fsdp_bytes: int
    blocks: int
    bound: str
    matrix: dict[str, int]
    exponentials: int
    atomics: int
    loop: int


def require_compiler(arch: str) -> None:
    """Raise ConfigError where this machine cannot compile for an architecture, or look into what comes out."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f"--arch {arch} is not known: type --arch " + " or --arch ".join(ARCHITECTURES))
    if find_spec("triton") is None:
        raise ConfigError("the triton package, which compiles the kernels, is not installed: type pip install triton")
    import triton

    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, which compiles nothing: type env -u TRITON_INTERPRET before it")
    for tool in ("cuobjdump", "nvdisasm"):
        try:
            _path(tool)
        except RuntimeError:
            raise ConfigError(
                f"{tool}, which reads what was compiled, is not in the triton package here: type "
                f"TRITON_{tool.upper()}_PATH=PATH before it, with the path of CUDA's own"
            ) from None


def launches(arch: str) -> list[Launch]:
    """Typical launches of all kernels on an architecture: ``LAUNCHES`` of the modules of
    :mod:`cpfold_train.kernels.triton`."""
    from cpfold_train.kernels import triton

    names = sorted(module.name for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."))
    modules = (importlib.import_module(name) for name in names)
    found = [launch for module in modules for launch in getattr(module, "LAUNCHES", ())]
    return [launch for launch in found if launch.major in (None, _number(arch) // 10)]


def compiled(launch: Launch, arch: str) -> Compiled:
    """Compile one kernel and inspect it.

    Args:
        launch: the kernel, with its argument types and constants. Pointers and sizes are taken to be divisible by 16,
            as those of Boltz-2's widths are.
        arch: one of :data:`ARCHITECTURES`.

    Raises:
        ConfigError: from :func:`require_compiler`, which is to be called before.
        Exception: the compiler's own, where a kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    source = ASTSource(launch.kernel, signature, constexprs=dict(launch.constants), attrs=aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", _number(arch), WARP), options=options)
    usage, instructions, targets = _disassembled(made.asm["cubin"])
    registers, static = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "SHARED"))
    shared = max(static, made.metadata.shared)
    warps, columns = made.metadata.num_warps, made.metadata.tmem_size or 0
    blocks, bound = occupancy(ARCHITECTURES[arch], registers, shared, warps, columns)
    found = Counter(instructions)
    return Compiled(
        kernel=launch.name,
        arch=arch,
        warps=warps,
        registers=registers,
        stores_spilled=_count(found, re.compile(r"STL\b")),
        loads_spilled=_count(found, re.compile(r"LDL\b")),
        fsdp_bytes=shared,
        blocks=blocks,
        bound=bound,
        matrix=dict(Counter(name.split(".")[0] for name in instructions if MATRIX.match(name))),
        exponentials=_count(found, re.compile(r"MUFU\.EX2\b")),
        atomics=_count(found, ATOMIC),
        loop=inner_loop(instructions, targets),
    )


def occupancy(arch: Architecture, registers: int, shared: int, warps: int, columns: int = 0) -> tuple[int, str]:
    """Blocks that a multiprocessor holds at a time, and what bounds their number.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
        columns: of tensor memory of a block.
    """
    each = -(-max(1, registers) // 8) * 8 * WARP * warps
    room = {
        "registers": REGISTERS // each,
        "shared memory": arch.shared // (shared + RESERVED_SHARED) if shared <= arch.shared_block else 0,
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
    }
    if columns:
        room["tensor memory"] = TENSOR_COLUMNS // columns
    bound = min(room, key=room.get)
    return room[bound], bound


def inner_loop(instructions: list[str], targets: list[int | None]) -> int:
    """Instructions of the loop that does the work: of the innermost ones that with products of matrix units and most
    exponentials, and the shortest of several such; 0 where there is none.

    A kernel that takes the last, incomplete block in a loop of its own, with fewer rows, has more than one.

    Args:
        instructions: names, in order.
        targets: for each, where it jumps to, or None.
    """
    # Each kernel ends with a jump to itself, which is never reached.
    ends = [(first, last) for last, first in enumerate(targets) if first is not None and first < last]
    innermost = [one for one in ends if not any(one != other and _within(other, one) for other in ends)]
    loops = []
    for first, last in innermost:
        body = instructions[first : last + 1]
        loops.append((any(map(MATRIX.match, body)), body.count("MUFU.EX2"), -len(body)))
    return -max(loops)[2] if loops else 0


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= loop[0] and loop[1] <= other[1]


def _number(arch: str) -> int:
    """90 of ``sm_90``: ten times the major compute capability, and the minor one."""
    return int(arch.removeprefix("sm_"))


def _count(found: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(count for name, count in found.items() if pattern.match(name))


def _disassembled(cubin: bytes) -> tuple[str, list[str], list[int | None]]:
    """Resource usage, names of the instructions in order, and where each jumps to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        text = _output("nvdisasm", "-c", file.name)
    labels: dict[str, int] = {}
    names, jumps = [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            names.append(code[1])
            jump = re.search(r"\.L_x_\d+", code[2]) if code[1].startswith("BRA") else None
            jumps.append(jump[0] if jump else None)
    return usage, names, [labels.get(jump) for jump in jumps]


def _output(tool: str, *args: str) -> str:
    return subprocess.run([_path(tool), *args], capture_output=True, text=True, check=True).stdout


def _path(tool: str) -> str:
    """Of one of NVIDIA's tools, of the triton package or where ``TRITON_CUOBJDUMP_PATH`` and the like say.

    Raises:
        RuntimeError: there is none.
    """
    from triton import knobs

    return getattr(knobs.nvidia, tool).path
