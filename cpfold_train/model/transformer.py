"""The diffusion transformer, of tokens and of atoms (``boltz/model/modules/transformersv2.py`` and ``attentionv2.py``).

It knows neither the grid nor who attends to whom: queries, keys and values are projected from this rank's shard, and
``attend`` brings together what belongs together (:mod:`cpfold_train.ops.token_attention`,
:mod:`cpfold_train.ops.window_attention`). Everything else concerns one token or atom of one sample.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from cpfold_train.kernels.by_rows import by_rows, rows_per_block
from cpfold_train.kernels.regions import region
from cpfold_train.model.layers import linear
from cpfold_train.ops.recompute import recompute

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries (scaled), keys and values (B*M, n, h, d) of this rank's shard and the bias of a layer to (B*M, n, h, d).
Masks, windows and the number of samples are the function's own."""


class AdaLN(nn.Module):
    """Norm of ``a`` with scale and shift from ``s`` (AlphaFold 3, Algorithm 26)."""

    def __init__(self, dim: int, dim_single_cond: int) -> None:
        super().__init__()
        self.a_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.s_norm = nn.LayerNorm(dim_single_cond, bias=False)
        self.s_scale = linear(dim_single_cond, dim, "default", bias=True)
        self.s_bias = linear(dim_single_cond, dim, "default")

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """(..., dim) and (..., dim_single_cond) to (..., dim); local."""
        return _adaptive_norm(a, s, *self.weights())

    def weights(self) -> tuple[Tensor, ...]:
        """Norm of s (c_s,), scale (c, c_s) and its bias (c,), shift (c, c_s)."""
        return self.s_norm.weight, self.s_scale.weight, self.s_scale.bias, self.s_bias.weight


class AttentionPairBias(nn.Module):
    """Gated attention with a given bias; only the queries have a bias of their own (AlphaFold 3, Algorithm 24)."""

    def __init__(self, c_s: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_q = linear(c_s, c_s, "default", bias=True)
        self.proj_k = linear(c_s, c_s, "default")
        self.proj_v = linear(c_s, c_s, "default")
        self.proj_g = linear(c_s, c_s, "default")
        self.proj_o = linear(c_s, c_s, "zero")

    def forward(self, s: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        """Update (B*M, n, c_s) of this rank's shard ``s``; ``bias`` is what ``attend`` takes."""
        weights = self.proj_q.weight, self.proj_q.bias, self.proj_k.weight, self.proj_v.weight, self.proj_g.weight
        q, k, v, gate = _projections(s, self.num_heads, *weights)
        return _gated_projection(attend(q, k, v, bias), gate, self.proj_o.weight)


class ConditionedTransitionBlock(nn.Module):
    """Gated transition of ``a``, with norm and output gate from ``s`` (AlphaFold 3, Algorithm 25).

    The widened product has a third factor that the algorithm has not: ``silu(gates) * x * a_to_b(a)``.
    """

    def __init__(self, dim_single: int, dim_single_cond: int, expansion_factor: int = 2) -> None:
        super().__init__()
        hidden = dim_single * expansion_factor
        self.adaln = AdaLN(dim_single, dim_single_cond)
        self.swish_gate = nn.Sequential(linear(dim_single, 2 * hidden, "default"))
        self.a_to_b = linear(dim_single, hidden, "default")
        self.b_to_a = linear(hidden, dim_single, "default")
        self.output_projection = nn.Sequential(_output_gate(dim_single_cond, dim_single))

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """(B*M, n, dim_single) and (B*M, n, dim_single_cond) to (B*M, n, dim_single); local, a few rows at a time."""
        gate = self.output_projection[0]
        own = self.swish_gate[0].weight, self.a_to_b.weight, self.b_to_a.weight, gate.weight, gate.bias
        row_bytes = a[:, :1].numel() // a.shape[-1] * own[0].shape[0] * a.element_size()
        return by_rows(_transition, rows_per_block(row_bytes, a.device), (a, s), (*self.adaln.weights(), *own))


class DiffusionTransformerLayer(nn.Module):
    """Attention and transition, both conditioned on ``s`` (AlphaFold 3, Algorithm 23)."""

    def __init__(self, heads: int, dim: int, dim_single_cond: int) -> None:
        super().__init__()
        self.adaln = AdaLN(dim, dim_single_cond)
        self.pair_bias_attn = AttentionPairBias(dim, heads)
        # One layer under two names, as in Boltz-2: a strict load of a checkpoint asks for both.
        self.output_projection_linear = _output_gate(dim_single_cond, dim)
        self.output_projection = nn.Sequential(self.output_projection_linear)
        self.transition = ConditionedTransitionBlock(dim, dim_single_cond)

    def forward(self, a: Tensor, s: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        """New ``a``; shapes as :meth:`DiffusionTransformer.forward`."""
        update = self.pair_bias_attn(self.adaln(a, s), bias, attend)
        gate = self.output_projection_linear
        a = _add_gated(a, s, update, gate.weight, gate.bias)
        return a + self.transition(a, s)


class DiffusionTransformer(nn.Module):
    """All layers."""

    def __init__(self, depth: int, heads: int, dim: int, dim_single_cond: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DiffusionTransformerLayer(heads, dim, dim_single_cond) for _ in range(depth))

    def forward(
        self, a: Tensor, s: Tensor, bias_of: Callable[[int], Tensor], attend: Attend, checkpoint: bool
    ) -> Tensor:
        """New ``a``.

        Args:
            a: (B*M, n, dim) this rank's shard of the tokens or atoms.
            s: (B*M, n, dim_single_cond) of the same.
            bias_of: the bias of layer i, as ``attend`` takes it.
            attend: see :data:`Attend`.
            checkpoint: recompute each layer, its bias included, in the backward pass, so that only ``a`` between layers
                is kept.
        """

        def step(i: int, a: Tensor, s: Tensor) -> Tensor:
            return self.layers[i](a, s, bias_of(i), attend)

        for i in range(len(self.layers)):
            a = recompute(step, i, a, s) if checkpoint else step(i, a, s)
        return a


def _output_gate(dim_single_cond: int, dim: int) -> nn.Linear:
    """Logits of an output gate that starts nearly closed."""
    gate = linear(dim_single_cond, dim, "zero", bias=True)
    nn.init.constant_(gate.bias, -2.0)
    return gate


@region
def _projections(
    s: Tensor, heads: int, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, v_weight: Tensor, gate_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values (B*M, n, h, d), and gates (B*M, n, h d)."""
    q, k, v = (F.linear(s, *w).unflatten(-1, (heads, -1)) for w in ((q_weight, q_bias), (k_weight,), (v_weight,)))
    return q * q.shape[-1] ** -0.5, k, v, F.linear(s, gate_weight).sigmoid()


@region
def _gated_projection(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return F.linear(gate * o.flatten(-2), weight)


@region
def _add_gated(a: Tensor, s: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return a + F.linear(s, weight, bias).sigmoid() * update


@region
def _adaptive_norm(
    a: Tensor, s: Tensor, norm_weight: Tensor, scale_weight: Tensor, scale_bias: Tensor, shift_weight: Tensor
) -> Tensor:
    s = F.layer_norm(s, norm_weight.shape, norm_weight)
    return F.linear(s, scale_weight, scale_bias).sigmoid() * F.layer_norm(a, a.shape[-1:]) + F.linear(s, shift_weight)


@region
def _transition(
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    shift_weight: Tensor,
    swish_gate: Tensor,
    a_to_b: Tensor,
    b_to_a: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
) -> Tensor:
    a = _adaptive_norm(a, s, norm_weight, scale_weight, scale_bias, shift_weight)
    x, gates = F.linear(a, swish_gate).chunk(2, -1)
    return F.linear(s, gate_weight, gate_bias).sigmoid() * F.linear(F.silu(gates) * x * F.linear(a, a_to_b), b_to_a)
