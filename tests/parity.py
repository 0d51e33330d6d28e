"""Comparing a module on a grid with the same module on 1x1: forward, every parameter's and every input's gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import Grid

LENGTHS = (13, 9)
"""Real tokens of the two samples: not a multiple of any grid, and one of them padded even on 1x1."""
DEPTHS = (7, 5)
"""Real MSA rows of the two samples."""
GRIDS = [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (1, 3), (5, 1)]

Call = Callable[[nn.Module, dict[str, Tensor], ContextParallel], Tensor]


def pad(x: Tensor, placement: str, grid: Grid) -> Tensor:
    """Pad a global tensor to sizes the grid can split: tokens, and sequences of an MSA."""
    n, s = grid.pad_tokens(max(LENGTHS)), grid.pad_rows(max(DEPTHS))
    sizes = {"pair": (n, n), "msa": (s, n), "token": (n,), "whole": ()}[placement]
    for dim, size in enumerate(sizes, start=1):
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
    return x


def join(parts: list[Tensor], placement: str, grid: Grid, partial: bool) -> Tensor:
    """The global tensor of all ranks' parts; replicated values are summed where they are partial, else compared."""
    if placement in ("pair", "msa"):
        rows = [torch.cat(parts[r * grid.cols : (r + 1) * grid.cols], 2) for r in range(grid.rows)]
        return torch.cat(rows, 1)
    if partial:
        return torch.stack(parts).sum(0)
    for other in parts[1:]:
        torch.testing.assert_close(other, parts[0], rtol=1e-12, atol=1e-12)
    return parts[0]


def real(x: Tensor, placement: str) -> Tensor:
    """Only what belongs to real tokens and sequences; what is padded is set to zero."""
    x = _zero_padding(x.clone(), placement)
    largest = {"pair": (max(LENGTHS),) * 2, "msa": (max(DEPTHS), max(LENGTHS)), "token": (max(LENGTHS),), "whole": ()}
    for dim, size in enumerate(largest[placement], start=1):
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

    n, s = cp.grid.pad_tokens(max(LENGTHS)), cp.grid.pad_rows(max(DEPTHS))
    sizes = {"pair": (n, n), "msa": (s, n), "token": (n,), "whole": ()}[out_placement]
    weight = torch.zeros(len(LENGTHS), *sizes, *out.shape[1 + len(sizes) :], dtype=out.dtype)
    kept = real(weight, out_placement)
    kept = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    weight[tuple(slice(0, size) for size in kept.shape)] = kept
    weight = _zero_padding(weight, out_placement)
    share = cut(weight, out_placement, cp.grid) * (1 if out_placement in ("pair", "msa") else 1 / cp.grid.cp_size)
    (out * share).sum().backward()
    return {
        "out": out.detach(),
        "inputs": {name: x.grad for name, x in local.items() if x.grad is not None},
        "parameters": {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
    }


def _zero_padding(x: Tensor, placement: str) -> Tensor:
    for i, (n, s) in enumerate(zip(LENGTHS, DEPTHS)):
        if placement == "pair":
            x[i, n:], x[i, :, n:] = 0, 0
        elif placement == "msa":
            x[i, s:], x[i, :, n:] = 0, 0
        elif placement == "token":
            x[i, n:] = 0
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
