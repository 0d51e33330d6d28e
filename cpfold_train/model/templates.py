"""The template module: what known structures of the same chains say about pairs.

AlphaFold 3, Algorithm 16, as Boltz-2 runs it (``boltz/model/modules/trunkv2.py``, TemplateV2Module).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.fused import product_dtype
from cpfold_train.kernels.layer_norm import layer_norm
from cpfold_train.model.blocks import kept_results
from cpfold_train.model.config import MemoryConfig, TemplateConfig
from cpfold_train.model.layers import linear, without_autocast
from cpfold_train.model.pair_stack import PairStack, pair_dropout
from cpfold_train.ops.offload import Boundary
from cpfold_train.ops.recompute import call, recompute
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.vocabulary import NUM_TOKENS


class TemplateStack(nn.Module):
    """The pair stacks that each template goes through."""

    def __init__(self, config: TemplateConfig, recompute_updates: bool) -> None:
        super().__init__()
        widths = config.pairwise_head_width, config.pairwise_num_heads
        self.layers = nn.ModuleList(
            PairStack(config.template_dim, *widths, recompute_updates) for _ in range(config.template_blocks)
        )


class _Tokens(NamedTuple):
    """What is known of a template's tokens, (B, n, ...): their types, representative atoms, which of these and of the
    frames are known, and which tokens were seen together."""

    restype: Tensor
    cb: Tensor
    cb_known: Tensor
    frame_known: Tensor
    visible: Tensor


class _Weights(NamedTuple):
    """Of what the stack starts from."""

    norm_weight: Tensor
    norm_bias: Tensor
    z_proj: Tensor
    a_proj: Tensor


class TemplateV2Module(nn.Module):
    """Update of z from templates, each of which shows any number of chains.

    Quirks that checkpoints are trained with: of the direction in which token i lies from the frame of token j only the
    signs of its components are seen; and the stack's result is added to its input, which it has in it already.
    """

    MIN_DIST, MAX_DIST, NUM_BINS = 3.25, 50.75, 38
    TOKEN_FEATURES = ("template_restype", "template_cb", "template_mask_cb", "template_mask_frame", "visibility_ids")
    """Those of :class:`_Tokens`."""

    def __init__(self, token_z: int, config: TemplateConfig, memory: MemoryConfig) -> None:
        super().__init__()
        dim = config.template_dim
        self.dropout, self.memory = config.dropout, memory
        self.z_norm = nn.LayerNorm(token_z)
        self.v_norm = nn.LayerNorm(dim)
        self.z_proj = linear(token_z, dim, "default")
        self.a_proj = linear(self.NUM_BINS + 5 + 2 * NUM_TOKENS, dim, "default")
        self.u_proj = linear(dim, token_z, "default")
        self.pairformer = TemplateStack(config, memory.recompute_updates)

    def forward(self, z: Tensor, feats: dict[str, Tensor], cp: ContextParallel, draws: RandomStreams | None) -> Tensor:
        """The change of z.

        Templates go one after the other, so that only one of them is held beside the sum.

        Args:
            z: pair tile (B, N/R, N/C, token_z).
            feats: ``template_restype`` (index), ``template_mask_cb``, ``template_mask_frame``, ``template_mask`` and
                ``visibility_ids`` (B, T, N), ``template_cb``, ``template_ca`` and ``template_frame_t`` (B, T, N, 3),
                ``template_frame_rot`` (B, T, N, 3, 3) with the axes in columns, and ``token_pad_mask`` (B, N).
            cp: the running grid.
            draws: dropout of the module; None in evaluation.
        """
        names = [name for name in feats if name.startswith("template_")] + ["visibility_ids"]
        given = feats["template_mask"].any(2).to(self.v_norm.weight.dtype)
        given = given / given.sum(1, keepdim=True).clamp(min=1)
        count, blocks = given.shape[1], len(self.pairformer.layers)
        if draws is not None:
            draws = draws.each("template_module", last=range(count)).each("block", last=range(blocks))
        dropout = pair_dropout(self.dropout, feats["token_pad_mask"].shape[1], draws)
        total, boundary = 0, None
        for t in range(count):
            template = {name: feats[name][:, t] for name in names}
            args = z, template, feats["token_pad_mask"], cp, None if dropout is None else dropout[t]
            if self.memory.recompute:
                boundary = Boundary(boundary) if self.memory.offload else None
                v = recompute(self._look_at, *args, results=kept_results(self.memory, boundary))
            else:
                v = self._look_at(*args)
            total = total + v * given[:, t, None, None, None]
        # The sum is in the precision of the weights; of what is kept for the projection z's is enough.
        return self.u_proj(F.relu(total.to(z.dtype)))

    def _look_at(
        self, z: Tensor, template: dict[str, Tensor], token_mask: Tensor, cp: ContextParallel, dropout: Tensor | None
    ) -> Tensor:
        """Tile (B, N/R, N/C, template_dim) of one template of each sample, whose features are (B, N, ...); ``dropout``
        is that of all blocks, (blocks, 4, B, N)."""
        v = self._embed(z, template, cp)
        update, blocks = v, self.pairformer.layers
        # Blocks that together are no wider than z hold no more than one of the Pairformer: the template's own
        # recomputation is enough. Of more blocks each is computed once more.
        run = recompute if self.memory.recompute and len(blocks) * v.shape[-1] > z.shape[-1] else call
        for i, block in enumerate(blocks):
            update = run(block.update_pairs, update, token_mask, cp, None if dropout is None else dropout[i])
        return layer_norm(v + update, self.v_norm.weight, self.v_norm.bias, cp.kernels, z.dtype)

    def _embed(self, z: Tensor, template: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        """What the stack starts from; the geometry is in fp32 whatever the precision of z."""
        n = template["template_mask"].shape[1]
        rows, cols = slice(*cp.grid.row_tokens(n)), slice(*cp.grid.col_tokens(n))
        i, j = (_Tokens(*(template[name][:, part] for name in self.TOKEN_FEATURES)) for part in (rows, cols))
        ca_i = template["template_ca"][:, rows]
        frames_j = (template[name][:, cols] for name in ("template_frame_rot", "template_frame_t"))
        weights = _Weights(self.z_norm.weight, self.z_norm.bias, self.z_proj.weight, self.a_proj.weight)
        row_bytes = z[:, :1].numel() * max(4, z.element_size())
        embed = partial(self._embed_rows, cp.kernels)
        return by_rows(embed, rows_per_block(row_bytes, z.device), (z, i, ca_i), (weights, j, *frames_j))

    def _embed_rows(
        self,
        kernels: str,
        z: Tensor,
        i: _Tokens,
        ca_i: Tensor,
        w: _Weights,
        j: _Tokens,
        rotation_j: Tensor,
        origin_j: Tensor,
    ) -> Tensor:
        """Rows (B, r, N/C, token_z) and the features of their tokens (B, r, ...) and of the columns' (B, N/C, ...)."""
        x = F.linear(layer_norm(z, w.norm_weight, w.norm_bias, kernels, product_dtype(z)), w.z_proj)
        with without_autocast(z):
            by_bin, by_cb, by_sign, by_frame, by_type_i, by_type_j = w.a_proj.T.split(
                [self.NUM_BINS, 1, 3, 1, NUM_TOKENS, NUM_TOKENS]
            )
            dtype = w.a_proj.dtype
            distance = torch.linalg.vector_norm(i.cb[:, :, None] - j.cb[:, None], dim=-1)
            boundaries = torch.linspace(
                self.MIN_DIST, self.MAX_DIST, self.NUM_BINS - 1, dtype=distance.dtype, device=distance.device
            )
            # R_j^T (ca_i - t_j), of which only the signs are seen.
            direction = sum(
                rotation_j[:, None, :, y] * (ca_i[:, :, None, y, None] - origin_j[:, None, :, y, None])
                for y in range(3)
            ).sign()
            a = F.embedding(torch.bucketize(distance, boundaries), by_bin)
            a = a + (i.cb_known[:, :, None] * j.cb_known[:, None])[..., None].to(dtype) * by_cb
            a = a + direction.to(dtype) @ by_sign
            a = a + (i.frame_known[:, :, None] * j.frame_known[:, None])[..., None].to(dtype) * by_frame
            a = a * (i.visible[:, :, None] == j.visible[:, None])[..., None].to(dtype)
            a = a + F.embedding(i.restype.long(), by_type_i)[:, :, None]
            a = a + F.embedding(j.restype.long(), by_type_j)[:, None]
            return (x + a).to(z.dtype)
