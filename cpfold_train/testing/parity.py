"""Comparing a module on a grid, or on another device, with the same module on 1x1 on the CPU.

Compared are the output and the gradient of every parameter and of every input, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpfold_train.data.schema import FEATURES
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import ATOM_WINDOW, Grid, join_tiles, split

LENGTHS = (13, 9)
"""Real tokens of the two samples: not a multiple of any grid, and one of them padded even on 1x1."""
DEPTHS = (7, 5)
"""Real MSA rows of the two samples."""
ATOMS = ((1, 1, 1, 1, 1, 24, 20, 11, 8, 9, 14, 6, 22), (4, 1, 1, 30, 5, 1, 1, 17, 3))
"""Atoms of each token of the two samples: four windows and two, some tokens in two of them."""
TOTALS = tuple(sum(counts) for counts in ATOMS)
PLACED = {
    "pair": lambda grid: (grid.pad_tokens(max(LENGTHS)),) * 2,
    "msa": lambda grid: (grid.pad_rows(max(DEPTHS)), grid.pad_tokens(max(LENGTHS))),
    "token": lambda grid: (grid.pad_tokens(max(LENGTHS)),),
    "shard": lambda grid: (grid.pad_tokens(max(LENGTHS)),),
    "atom": lambda grid: (grid.pad_atoms(max(TOTALS)),),
    "window": lambda grid: (grid.pad_atoms(max(TOTALS)) // ATOM_WINDOW,),
    "whole": lambda grid: (),
}
"""Padded sizes from dim 1 on: of pairs, MSAs, tokens on all ranks, sharded tokens, atoms and windows."""
SHARDED = ("shard", "atom", "window")
PARTED = ("pair", "msa", *SHARDED)
"""What no two ranks hold the same of."""

_KIND_OF_DIMS = {"token token": "pair", "sequence token": "msa", "atom": "atom", "token": "token"}
Call = Callable[[nn.Module, dict[str, Tensor], ContextParallel], Tensor]


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        build: makes the module, in fp64.
        call: its output on a rank, from the module, this rank's inputs and the running grid.
        inputs: global tensors by name; those of floats that are no masks get gradients.
        placements: of each of them, one of :data:`PLACED`.
        out_placement: of the output.
        tolerance: largest relative error on another device, of norms. Normal draws may differ in the last bit of fp32,
            since each device has a logarithm and a cosine of its own.
    """

    build: Callable[[], nn.Module]
    call: Call
    inputs: dict[str, Tensor]
    placements: dict[str, str]
    out_placement: str
    tolerance: float = 1e-9


def placed(inputs: dict[str, tuple[Tensor, str]], names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Some of several inputs and their placements, as :class:`Case` takes them."""
    return {name: inputs[name][0] for name in names}, {name: inputs[name][1] for name in names}


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pad(x: Tensor, placement: str, grid: Grid) -> Tensor:
    """Pad a global tensor to sizes the grid can split."""
    for dim, size in enumerate(PLACED[placement](grid), start=1):
        shape = list(x.shape)
        shape[dim] = size - x.shape[dim]
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x


def cut_features(whole: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """This rank's parts of features of the two samples, padded; where they lie follows from the schema."""
    found = {}
    for name, x in whole.items():
        dims = FEATURES[name].dims
        kind = next(kind for words, kind in _KIND_OF_DIMS.items() if dims.startswith(words))
        found[name] = cut(pad(x, kind, grid), kind, grid)
    return found


def cut(x: Tensor, placement: str, grid: Grid) -> Tensor:
    """This rank's part of a padded global tensor."""
    if placement == "pair":
        return x[:, slice(*grid.row_tokens(x.shape[1])), slice(*grid.col_tokens(x.shape[2]))]
    if placement == "msa":
        return x[:, slice(*grid.msa_rows(x.shape[1])), slice(*grid.col_tokens(x.shape[2]))]
    if placement in SHARDED:
        return x[:, slice(*split(x.shape[1], grid.cp_size)[grid.cp_index])]
    return x


def join(parts: list[Tensor], placement: str, grid: Grid, partial: bool) -> Tensor:
    """The global tensor of all ranks' parts; replicated values are summed where they are partial, else compared."""
    if placement in ("pair", "msa"):
        return join_tiles(parts, grid, torch.cat, 1)
    if placement in SHARDED:
        return torch.cat(parts, 1)
    if partial:
        return torch.stack(parts).sum(0)
    for other in parts[1:]:
        torch.testing.assert_close(other, parts[0], rtol=1e-12, atol=1e-12)
    return parts[0]


def real(x: Tensor, placement: str) -> Tensor:
    """Only what belongs to real tokens, sequences and atoms; what is padded is set to zero."""
    x = _zero_padding(x.clone(), placement)
    for dim, size in enumerate(PLACED[placement](Grid()), start=1):
        x = x.narrow(dim, 0, size)
    return x


def to_device(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Tensors on a device; what is none stays where it is."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}


def run(cp: ContextParallel, case: Case) -> dict:
    """Forward and backward on this rank, on the grid's device; returns this rank's output and gradients, on the CPU.

    The loss is a fixed random weighting of the real outputs; a replicated output counts 1/P of it on each rank.
    """
    device = cp.mesh.device_type
    module = case.build()
    randomise(module)
    module.to(device)
    local = {}
    for name, x in case.inputs.items():
        x = cut(pad(x, case.placements[name], cp.grid), case.placements[name], cp.grid).clone().to(device)
        local[name] = x.requires_grad_(x.is_floating_point() and "mask" not in name)
    out = case.call(module, local, cp)

    placement = case.out_placement
    sizes = PLACED[placement](cp.grid)
    weight = torch.zeros(out.shape[0], *sizes, *out.shape[1 + len(sizes) :], dtype=out.dtype)
    kept = real(weight, placement)
    kept = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    weight[tuple(slice(0, size) for size in kept.shape)] = kept
    weight = _zero_padding(weight, placement)
    share = cut(weight, placement, cp.grid) * (1 if placement in PARTED else 1 / cp.grid.cp_size)
    (out * share.to(device)).sum().backward()
    return {
        "out": out.detach().cpu(),
        "inputs": {name: x.grad.cpu() for name, x in local.items() if x.grad is not None},
        "parameters": {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None},
    }


def compared(serial: dict, parts: list[dict], grid: Grid, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """What all ranks found and what 1x1 found, by what it is.

    Args:
        serial: what :func:`run` returns on 1x1.
        parts: what it returns on each rank of ``grid``.
    """
    out = join([part["out"] for part in parts], case.out_placement, grid, partial=False)
    found = {"output": (real(out, case.out_placement), real(serial["out"], case.out_placement))}
    for kind in ("inputs", "parameters"):
        for name, expected in serial[kind].items():
            placement = case.placements[name] if kind == "inputs" else "whole"
            grad = join([part[kind][name] for part in parts], placement, grid, partial=True)
            found[f"gradient of {name}"] = real(grad, placement), real(expected, placement)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected.

    Some gradients are zero but for rounding, as that of a bias before a softmax: 1e-5 an element counts as nothing.
    """
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / (expected.norm() + 1e-5 * expected.numel() ** 0.5)).item()


def _zero_padding(x: Tensor, placement: str) -> Tensor:
    """Of each of the samples of each complex: there may be several."""
    if placement == "whole":
        return x
    for i, (n, s, a) in enumerate(zip(LENGTHS, DEPTHS, TOTALS)):
        x_i = x.unflatten(0, (len(LENGTHS), -1))[i]
        if placement == "pair":
            x_i[:, n:], x_i[:, :, n:] = 0, 0
        elif placement == "msa":
            x_i[:, s:], x_i[:, :, n:] = 0, 0
        elif placement in ("token", "shard"):
            x_i[:, n:] = 0
        elif placement == "atom":
            x_i[:, a:] = 0
    return x


def randomise(module: nn.Module) -> None:
    """Give every parameter a value of its own: many start at zero, and zeros hide errors."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
