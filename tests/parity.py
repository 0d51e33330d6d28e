"""Comparing a module on a grid with the same module on 1x1: forward, every parameter's and every input's gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import ATOM_WINDOW, Grid, split

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
    "share": lambda grid: (grid.pad_tokens(max(LENGTHS)),),
    "atom": lambda grid: (grid.pad_atoms(max(TOTALS)),),
    "window": lambda grid: (grid.pad_atoms(max(TOTALS)) // ATOM_WINDOW,),
    "whole": lambda grid: (),
}
"""Padded sizes from dim 1 on: of pairs, MSAs, tokens on all ranks, tokens shared out, atoms and windows shared out."""
SHARED = ("share", "atom", "window")
PARTED = ("pair", "msa", *SHARED)
"""What no two ranks hold the same of."""
GRIDS = [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (1, 3), (5, 1)]

Call = Callable[[nn.Module, dict[str, Tensor], ContextParallel], Tensor]


def pad(x: Tensor, placement: str, grid: Grid) -> Tensor:
    """Pad a global tensor to sizes the grid can split."""
    for dim, size in enumerate(PLACED[placement](grid), start=1):
        shape = list(x.shape)
        shape[dim] = size - x.shape[dim]
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x


def cut(x: Tensor, placement: str, grid: Grid) -> Tensor:
    """This rank's part of a padded global tensor."""
    if placement == "pair":
        return x[:, slice(*grid.row_tokens(x.shape[1])), slice(*grid.col_tokens(x.shape[2]))]
    if placement == "msa":
        return x[:, slice(*grid.msa_rows(x.shape[1])), slice(*grid.col_tokens(x.shape[2]))]
    if placement in SHARED:
        return x[:, slice(*split(x.shape[1], grid.cp_size)[grid.cp_index])]
    return x


def join(parts: list[Tensor], placement: str, grid: Grid, partial: bool) -> Tensor:
    """The global tensor of all ranks' parts; replicated values are summed where they are partial, else compared."""
    if placement in ("pair", "msa"):
        rows = [torch.cat(parts[r * grid.cols : (r + 1) * grid.cols], 2) for r in range(grid.rows)]
        return torch.cat(rows, 1)
    if placement in SHARED:
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


def run(cp: ContextParallel, build, call: Call, inputs: dict, placements: dict, out_placement: str) -> dict:
    """Forward and backward on this rank; returns this rank's output and gradients.

    The loss is a fixed random weighting of the real outputs; a replicated output counts 1/P of it on each rank.
    """
    module = build()
    randomise(module)
    local = {}
    for name, x in inputs.items():
        x = cut(pad(x, placements[name], cp.grid), placements[name], cp.grid).clone()
        local[name] = x.requires_grad_(x.is_floating_point() and "mask" not in name)
    out = call(module, local, cp)

    sizes = PLACED[out_placement](cp.grid)
    weight = torch.zeros(out.shape[0], *sizes, *out.shape[1 + len(sizes) :], dtype=out.dtype)
    kept = real(weight, out_placement)
    kept = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    weight[tuple(slice(0, size) for size in kept.shape)] = kept
    weight = _zero_padding(weight, out_placement)
    share = cut(weight, out_placement, cp.grid) * (1 if out_placement in PARTED else 1 / cp.grid.cp_size)
    (out * share).sum().backward()
    return {
        "out": out.detach(),
        "inputs": {name: x.grad for name, x in local.items() if x.grad is not None},
        "parameters": {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
    }


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
        elif placement in ("token", "share"):
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


def check(ranks, rows: int, cols: int, build, call: Call, inputs: dict, placements: dict, out_placement: str) -> None:
    """Assert that a grid gives what 1x1 gives, to 1e-9 in fp64."""
    args = build, call, inputs, placements, out_placement
    (serial,) = ranks.run(run, 1, 1, *args)
    parts = ranks.run(run, rows, cols, *args)
    grid = Grid(rows, cols)

    def close(actual: Tensor, expected: Tensor, what: str) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=lambda text: f"{what}: {text}")

    out = join([part["out"] for part in parts], out_placement, grid, partial=False)
    close(real(out, out_placement), real(serial["out"], out_placement), "output")
    for kind, expected_of in (("inputs", serial["inputs"]), ("parameters", serial["parameters"])):
        for part in parts:
            assert part[kind].keys() == expected_of.keys()
        for name, expected in expected_of.items():
            placement = placements.get(name, "whole") if kind == "inputs" else "whole"
            grad = join([part[kind][name] for part in parts], placement, grid, partial=True)
            close(real(grad, placement), real(expected, placement), f"gradient of {name}")
            assert expected.abs().max() > 0, f"the gradient of {name} is zero: the test cannot fail"
