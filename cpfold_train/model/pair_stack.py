"""The pair stack: triangle multiplication, triangle attention and transition on tiles of z.

AlphaFold 3, Algorithm 17 lines 2-6; module and parameter names of ``boltz/model/layers`` (triangular_mult.py,
triangular_attention/, pairformer.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cpfold_train.model.layers import Transition, linear
from cpfold_train.ops import triangle_attention as attention
from cpfold_train.ops import triangle_multiplication as multiplication
from cpfold_train.ops.dropout import row_factors
from cpfold_train.ops.pair_mask import pair_mask
from cpfold_train.ops.recompute import call, recompute
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams

SITES = ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end")
"""Names of the triangle updates in their order, and of the streams of their dropout."""


def pair_dropout(p: float, n: int, draws: RandomStreams | None) -> Tensor | None:
    """Dropout of the triangle updates of a layer, or at once of all layers of a stack.

    Args:
        p: probability.
        n: N.
        draws: streams of the layer, (B,), or of all layers, such as (layers, B); None in evaluation.

    Returns:
        (..., 4, B, N), for :meth:`PairStack.update_pairs`: factors of whole rows, and of whole columns of the last
        update. None where there is no dropout.
    """
    return row_factors(p, (0, n), None if draws is None else draws.each(last=SITES))


class TriangleMultiplication(nn.Module):
    """Parameters of a triangle multiplication; subclasses say which edges are multiplied."""

    multiply: Callable[..., Tensor]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.p_in = linear(dim, 2 * dim)
        self.g_in = linear(dim, 2 * dim, "zero")
        self.norm_out = nn.LayerNorm(dim)
        self.p_out = linear(dim, dim, "zero")
        self.g_out = linear(dim, dim, "zero")

    def forward(
        self,
        z: Tensor,
        pair_mask: Tensor,
        cp: ContextParallel,
        residual: bool = False,
        row_factors: Tensor | None = None,
    ) -> Tensor:
        """Update for a tile (B, N/R, N/C, c), times ``row_factors`` (B, N/R) and added to it if ``residual``;
        ``pair_mask`` is a tile (B, N/R, N/C)."""
        weights = multiplication.MultiplicationWeights(
            self.norm_in.weight,
            self.norm_in.bias,
            self.p_in.weight,
            self.g_in.weight,
            self.norm_out.weight,
            self.norm_out.bias,
            self.p_out.weight,
            self.g_out.weight,
        )
        return self.multiply(z, pair_mask, weights, cp, residual, row_factors)


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """AlphaFold 3, Algorithm 12."""

    multiply = staticmethod(multiplication.triangle_multiplication_outgoing)


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """AlphaFold 3, Algorithm 13."""

    multiply = staticmethod(multiplication.triangle_multiplication_incoming)


class RowAttention(nn.Module):
    """Parameters of the attention within rows (``boltz/model/layers/triangular_attention/primitives.py``)."""

    def __init__(self, dim: int, head_width: int, num_heads: int) -> None:
        super().__init__()
        self.linear_q = linear(dim, head_width * num_heads, "glorot")
        self.linear_k = linear(dim, head_width * num_heads, "glorot")
        self.linear_v = linear(dim, head_width * num_heads, "glorot")
        self.linear_o = linear(head_width * num_heads, dim, "zero")
        self.linear_g = linear(dim, head_width * num_heads, "zero")


class TriangleAttention(nn.Module):
    """Parameters of a triangle attention; subclasses say around which node."""

    attend: Callable[..., Tensor]

    def __init__(self, dim: int, head_width: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.linear = linear(dim, num_heads)
        self.mha = RowAttention(dim, head_width, num_heads)

    def forward(
        self,
        z: Tensor,
        token_mask: Tensor,
        cp: ContextParallel,
        residual: bool = False,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Update for a tile (B, N/R, N/C, c), times ``factors`` of its rows (B, N/R), or around the ending node of its
        columns (B, N/C), and added to it if ``residual``; ``token_mask`` (B, N)."""
        weights = attention.AttentionWeights(
            self.layer_norm.weight,
            self.layer_norm.bias,
            self.linear.weight,
            self.mha.linear_q.weight,
            self.mha.linear_k.weight,
            self.mha.linear_v.weight,
            self.mha.linear_g.weight,
            self.mha.linear_o.weight,
        )
        return self.attend(z, token_mask, weights, cp, residual, factors)


class TriangleAttentionStartingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 14."""

    attend = staticmethod(attention.triangle_attention_starting)


class TriangleAttentionEndingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 15."""

    attend = staticmethod(attention.triangle_attention_ending)


class PairStack(nn.Module):
    """Triangle updates and transition of z, each added to it; the whole of Boltz's PairformerNoSeqLayer.

    Args:
        token_z: channels of z.
        pairwise_head_width, pairwise_num_heads: of the triangle attention.
        recompute_updates: compute each triangle update again in the backward pass, by itself.
    """

    def __init__(
        self,
        token_z: int,
        pairwise_head_width: int,
        pairwise_num_heads: int,
        recompute_updates: bool = False,
    ) -> None:
        super().__init__()
        self.run = recompute if recompute_updates else call
        self.tri_mul_out = TriangleMultiplicationOutgoing(token_z)
        self.tri_mul_in = TriangleMultiplicationIncoming(token_z)
        self.tri_att_start = TriangleAttentionStartingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.tri_att_end = TriangleAttentionEndingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.transition_z = Transition(token_z, 4 * token_z)

    def update_pairs(self, z: Tensor, token_mask: Tensor, cp: ContextParallel, dropout: Tensor | None) -> Tensor:
        """New z.

        Args:
            z: tile (B, N/R, N/C, token_z).
            token_mask: (B, N).
            cp: the running grid.
            dropout: (4, B, N), see :func:`pair_dropout`; None in evaluation.
        """
        n = token_mask.shape[1]
        rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
        mask = pair_mask(token_mask, cp.grid)
        multiplied, attended = (mask, rows), (token_mask, rows)

        def updated(z: Tensor, site: int, mask: Tensor, positions: slice) -> Tensor:
            factors = None if dropout is None else dropout[site, :, positions]
            return getattr(self, SITES[site])(z, mask, cp, True, factors)

        for site, args in enumerate((multiplied, multiplied, attended, (token_mask, cols))):
            z = self.run(updated, z, site, *args)
        return self.transition_z(z, cp.kernels, residual=True)
