"""The pair stack: triangle multiplication, triangle attention and transition on tiles of z.

AlphaFold 3, Algorithm 17 lines 2-6; module and parameter names of ``boltz/model/layers`` (triangular_mult.py,
triangular_attention/, pairformer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from cpfold_train.model.layers import Transition, linear
from cpfold_train.ops.biased_attention import biased_attention
from cpfold_train.ops.dropout import drop_cols, drop_rows
from cpfold_train.ops.triangle_attention import Attend, triangle_attention_ending, triangle_attention_starting
from cpfold_train.ops.triangle_multiplication import (
    triangle_multiplication_incoming,
    triangle_multiplication_outgoing,
)
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import Draws


class TriangleMultiplication(nn.Module):
    """Gated projections around the triangle multiplication; subclasses say which edges they ``combine``."""

    combine: Callable[[Tensor, Tensor, ContextParallel], Tensor]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.p_in = linear(dim, 2 * dim)
        self.g_in = linear(dim, 2 * dim, "zero")
        self.norm_out = nn.LayerNorm(dim)
        self.p_out = linear(dim, dim, "zero")
        self.g_out = linear(dim, dim, "zero")

    def forward(self, z: Tensor, pair_mask: Tensor, cp: ContextParallel) -> Tensor:
        """Update for a tile.

        Args:
            z: (B, N/R, N/C, c).
            pair_mask: (B, N/R, N/C).
            cp: the running grid.
        """
        x = self.norm_in(z)
        a, b = (self.p_in(x) * self.g_in(x).sigmoid() * pair_mask[..., None].to(x.dtype)).chunk(2, -1)
        return self.p_out(self.norm_out(self.combine(a, b, cp))) * self.g_out(x).sigmoid()


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """AlphaFold 3, Algorithm 12."""

    combine = staticmethod(triangle_multiplication_outgoing)


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """AlphaFold 3, Algorithm 13."""

    combine = staticmethod(triangle_multiplication_incoming)


class RowAttention(nn.Module):
    """Gated multi-head attention of complete rows (``boltz/model/layers/triangular_attention/primitives.py``)."""

    def __init__(self, dim: int, head_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = linear(dim, head_width * num_heads, "glorot")
        self.linear_k = linear(dim, head_width * num_heads, "glorot")
        self.linear_v = linear(dim, head_width * num_heads, "glorot")
        self.linear_o = linear(head_width * num_heads, dim, "zero")
        self.linear_g = linear(dim, head_width * num_heads, "zero")

    def forward(self, x: Tensor, bias: Tensor, key_mask: Tensor) -> Tensor:
        """Rows (B, r, N, c), bias (B, h, N, N) and mask (B, N) to (B, r, N, c)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)
            for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        o = biased_attention(q * q.shape[-1] ** -0.5, k, v, bias, key_mask)
        o = o.permute(0, 2, 3, 1, 4).flatten(-2)
        return self.linear_o(self.linear_g(x).sigmoid() * o)


class TriangleAttention(nn.Module):
    """Norm, triangle bias and row attention; subclasses say how tiles become rows to ``attend`` and come back."""

    attend: Callable[[Tensor, Tensor, Attend, ContextParallel], Tensor]

    def __init__(self, dim: int, head_width: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.linear = linear(dim, num_heads)
        self.mha = RowAttention(dim, head_width, num_heads)

    def forward(self, z: Tensor, key_mask: Tensor, cp: ContextParallel) -> Tensor:
        """Update for a tile (B, N/R, N/C, c); ``key_mask`` (B, N)."""
        x = self.layer_norm(z)
        return self.attend(x, self.linear(x), partial(self.mha, key_mask=key_mask), cp)


class TriangleAttentionStartingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 14."""

    attend = staticmethod(triangle_attention_starting)


class TriangleAttentionEndingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 15."""

    attend = staticmethod(triangle_attention_ending)


class PairStack(nn.Module):
    """Triangle updates and transition of z, each added to it; the whole of Boltz's PairformerNoSeqLayer."""

    def __init__(self, token_z: int, dropout: float, pairwise_head_width: int, pairwise_num_heads: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.tri_mul_out = TriangleMultiplicationOutgoing(token_z)
        self.tri_mul_in = TriangleMultiplicationIncoming(token_z)
        self.tri_att_start = TriangleAttentionStartingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.tri_att_end = TriangleAttentionEndingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.transition_z = Transition(token_z, 4 * token_z)

    def update_pairs(self, z: Tensor, token_mask: Tensor, cp: ContextParallel, draws: Draws | None) -> Tensor:
        """New z.

        Args:
            z: tile (B, N/R, N/C, token_z).
            token_mask: (B, N).
            cp: the running grid.
            draws: dropout of this layer; None in evaluation.
        """
        n = token_mask.shape[1]
        rows, cols = cp.grid.row_tokens(n), cp.grid.col_tokens(n)
        pair_mask = token_mask[:, slice(*rows), None] * token_mask[:, None, slice(*cols)]

        def at(site: str) -> Draws | None:
            return None if draws is None else draws.at(site)

        z = z + drop_rows(self.tri_mul_out(z, pair_mask, cp), self.dropout, rows, at("tri_mul_out"))
        z = z + drop_rows(self.tri_mul_in(z, pair_mask, cp), self.dropout, rows, at("tri_mul_in"))
        z = z + drop_rows(self.tri_att_start(z, token_mask, cp), self.dropout, rows, at("tri_att_start"))
        z = z + drop_cols(self.tri_att_end(z, token_mask, cp), self.dropout, cols, at("tri_att_end"))
        return z + self.transition_z(z)
