"""The Pairformer (AlphaFold 3, Algorithm 17; ``boltz/model/layers/pairformer.py`` and ``attentionv2.py``)."""

from __future__ import annotations

from torch import Tensor, nn

from cpfold_train.model.blocks import run_blocks
from cpfold_train.model.config import MemoryConfig, PairformerConfig
from cpfold_train.model.layers import Transition, linear, normed_linear, without_autocast
from cpfold_train.model.pair_stack import PairStack, pair_dropout
from cpfold_train.ops.attention_pair_bias import all_tokens, attention_pair_bias
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams


class AttentionPairBias(nn.Module):
    """Gated attention of the single representation with a bias from z; only the queries have a bias."""

    def __init__(self, c_s: int, c_z: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_q = linear(c_s, c_s, "default", bias=True)
        self.proj_k = linear(c_s, c_s, "default")
        self.proj_v = linear(c_s, c_s, "default")
        self.proj_g = linear(c_s, c_s, "default")
        self.proj_z = nn.Sequential(nn.LayerNorm(c_z), linear(c_z, num_heads, "default"))
        self.proj_o = linear(c_s, c_s, "zero")

    def forward(self, s: Tensor, z: Tensor, token_mask: Tensor, cp: ContextParallel) -> Tensor:
        """Update for the tile's rows of s.

        Args:
            s: (B, N, c_s), the same on all ranks.
            z: tile (B, N/R, N/C, c_z).
            token_mask: (B, N), 1 for real tokens.
            cp: the running grid.

        Returns:
            (B, N/R, c_s), the same on all ranks of a grid row.
        """
        n = s.shape[1]
        rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
        queries, keys = s[:, rows], s[:, cols]
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1))
            for project, x in ((self.proj_q, queries), (self.proj_k, keys), (self.proj_v, keys))
        )
        bias = normed_linear(z, *self.proj_z, cp.kernels)
        o = attention_pair_bias(q * q.shape[-1] ** -0.5, k, v, bias, token_mask[:, cols], cp)
        return self.proj_o(self.proj_g(queries).sigmoid() * o.flatten(-2))


class PairformerLayer(PairStack):
    """One block: the pair stack, then attention and transition of s, which reads the updated z."""

    def __init__(
        self,
        token_s: int,
        token_z: int,
        num_heads: int,
        pairwise_head_width: int,
        pairwise_num_heads: int,
        recompute_updates: bool = False,
    ) -> None:
        super().__init__(token_z, pairwise_head_width, pairwise_num_heads, recompute_updates)
        self.pre_norm_s = nn.LayerNorm(token_s)
        self.attention = AttentionPairBias(token_s, token_z, num_heads)
        self.transition_s = Transition(token_s, 4 * token_s)

    def forward(
        self, s: Tensor, z: Tensor, token_mask: Tensor, cp: ContextParallel, dropout: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """New s and z.

        Args:
            s: (B, N, token_s), the same on all ranks.
            z: tile (B, N/R, N/C, token_z).
            token_mask: (B, N).
            cp: the running grid.
            dropout: (4, B, N), see :func:`~cpfold_train.model.pair_stack.pair_dropout`; None in evaluation.
        """
        z = self.update_pairs(z, token_mask, cp, dropout)
        # The single track is an fp32 island whatever the precision of z: its values grow over the blocks.
        with without_autocast(s):
            dtype = self.pre_norm_s.weight.dtype
            s = s.to(dtype)
            rows = s[:, slice(*cp.grid.row_tokens(s.shape[1]))]
            rows = rows + self.attention(self.pre_norm_s(s), z, token_mask, cp)
            rows = self.transition_s(rows, cp.kernels, residual=True)
            return all_tokens(rows, cp), z


class PairformerModule(nn.Module):
    """All blocks."""

    def __init__(self, token_s: int, token_z: int, config: PairformerConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.dropout, self.memory = config.dropout, memory
        self.layers = nn.ModuleList(
            PairformerLayer(
                token_s,
                token_z,
                config.num_heads,
                config.pairwise_head_width,
                config.pairwise_num_heads,
                memory.recompute_updates,
            )
            for _ in range(config.num_blocks)
        )

    def forward(
        self, s: Tensor, z: Tensor, token_mask: Tensor, cp: ContextParallel, draws: RandomStreams | None
    ) -> tuple[Tensor, Tensor]:
        """New s and z; shapes as :meth:`PairformerLayer.forward`. ``draws`` are those of all blocks; None in
        evaluation."""
        of_blocks = None if draws is None else draws.each("pairformer", last=range(len(self.layers)))
        dropout = pair_dropout(self.dropout, token_mask.shape[1], of_blocks)

        def block(i: int, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return self.layers[i](s, z, token_mask, cp, None if dropout is None else dropout[i])[::-1]

        z, s = run_blocks(block, len(self.layers), z, s, self.memory)
        return s, z
