"""Sizes of the model and their bounds. The defaults are Boltz-2's; the presets are in ``conf/model``."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpfold_train.bounds import above, at_least, below, key, one_of
from cpfold_train.vocabulary import BOLTZ2, FEATURE_SETS

RESIDUALS = ("fp32", "bf16")
"""Precision of z between blocks; fp32 is that of the weights."""
WEIGHTS = ("raw", "ema")
"""Of a checkpoint: those under training, or their moving average."""


@dataclass
class MemoryConfig:
    """What a training step keeps for its backward pass, and how much it works on at a time.

    Nothing of it changes what is computed, but for ``residual``.

    Attributes:
        auto: let the planner choose everything else.
        recompute: compute each block again in the backward pass, so that only z, s and m between blocks are kept.
        blocks_at_once: so many blocks of the MSA module or of a Pairformer are also recomputed as one: of n blocks,
            n / g + g pairs of z and s are kept instead of n, for one more forward pass.
        recompute_updates: of a block that is recomputed keep z and m before each of their updates, and recompute each
            update once more.
        residual: ``fp32``, or ``bf16`` for z between blocks.
        offload: keep z and m between blocks in the memory of the host; None, which a run decides by their size, does
            not.
        keep_attention: of a block that is recomputed keep the results of triangle attention, on the host with
            ``offload``, and do not compute them again; None, which a run decides by their size, does not.
        chunk_mib: size of the widest intermediate of what is computed a few rows at a time; None is 4 on CPU and 256
            on GPUs.
        samples_at_once: diffusion samples that go through the diffusion module together; None is all.
    """

    auto: bool = False
    recompute: bool = True
    blocks_at_once: int = key(at_least(1), 1)
    recompute_updates: bool = False
    residual: str = key(one_of(*RESIDUALS), "fp32")
    offload: bool | None = None
    keep_attention: bool | None = None
    chunk_mib: float | None = key(at_least(0.001), None)
    samples_at_once: int | None = key(at_least(1), None)


@dataclass
class MSAConfig:
    """The MSA module: width of m, blocks, dropout of m and of z, and the triangle attention inside."""

    msa_s: int = key(at_least(1), 64)
    msa_blocks: int = key(at_least(0), 4)
    msa_dropout: float = key(below(1, "0.25"), 0.15)
    z_dropout: float = key(below(1, "0.25"), 0.25)
    pairwise_head_width: int = key(at_least(1), 32)
    pairwise_num_heads: int = key(at_least(1), 4)


@dataclass
class PairformerConfig:
    """The Pairformer: blocks, heads of the single attention, dropout of z, the triangle attention inside."""

    num_blocks: int = key(at_least(0), 64)
    num_heads: int = key(at_least(1), 16)
    dropout: float = key(below(1, "0.25"), 0.25)
    pairwise_head_width: int = key(at_least(1), 32)
    pairwise_num_heads: int = key(at_least(1), 4)


@dataclass
class AtomConfig:
    """Atoms: width of their representation and of that of their pairs, and layers and heads of each encoder's and of
    the decoder's attention within windows."""

    atom_s: int = key(at_least(1), 128)
    atom_z: int = key(at_least(1), 16)
    atom_encoder_depth: int = key(at_least(1), 3)
    atom_encoder_heads: int = key(at_least(1), 4)
    atom_decoder_depth: int = key(at_least(1), 3)
    atom_decoder_heads: int = key(at_least(1), 4)


@dataclass
class DiffusionConfig:
    """The diffusion module and its process; lengths and noise levels in Angstrom.

    Attributes:
        token_transformer_depth: layers of the transformer of tokens.
        token_transformer_heads: its heads.
        conditioning_transition_layers: transitions of the pair and of the single conditioning.
        dim_fourier: features of the noise level.
        sigma_data: standard deviation of the data.
        P_mean: mean of the normal deviate whose exponential times ``sigma_data`` is the noise level in training.
        P_std: its standard deviation.
        sigma_max: first noise level of a sampling, in units of ``sigma_data``.
        sigma_min: last one before zero, in units of ``sigma_data``.
        rho: how much denser levels are towards the end.
        gamma_0: noise added before each step, relative to the level, as long as levels are above ``gamma_min``.
        gamma_min: see there.
        noise_scale: factor of the noise added.
        step_scale: factor of each step towards the prediction.
    """

    token_transformer_depth: int = key(at_least(0), 24)
    token_transformer_heads: int = key(at_least(1), 16)
    conditioning_transition_layers: int = key(at_least(0), 2)
    dim_fourier: int = key(at_least(1), 256)
    sigma_data: float = key(above(0, "16"), 16.0)
    P_mean: float = -1.2
    P_std: float = key(at_least(0), 1.5)
    sigma_max: float = key(above(0, "160"), 160.0)
    sigma_min: float = key(above(0, "0.0001"), 0.0001)
    rho: float = key(above(0, "7"), 7.0)
    gamma_0: float = key(at_least(0), 0.8)
    gamma_min: float = key(at_least(0), 1.0)
    noise_scale: float = key(at_least(0), 1.003)
    step_scale: float = key(above(0, "1.5"), 1.5)


@dataclass
class TemplateConfig:
    """The template module: width of its pair representation, blocks, their dropout and triangle attention."""

    template_dim: int = key(at_least(1), 64)
    template_blocks: int = key(at_least(0), 2)
    dropout: float = key(below(1, "0.25"), 0.25)
    pairwise_head_width: int = key(at_least(1), 32)
    pairwise_num_heads: int = key(at_least(1), 4)


@dataclass
class ConfidenceConfig:
    """The confidence module: its Pairformer, and the bins of predicted distances and of what the heads predict."""

    pairformer: PairformerConfig = field(default_factory=lambda: PairformerConfig(num_blocks=8))
    num_dist_bins: int = key(at_least(2), 64)
    max_dist: float = key(above(2, "22"), 22.0)
    num_plddt_bins: int = key(at_least(1), 50)
    num_pde_bins: int = key(at_least(1), 64)
    num_pae_bins: int = key(at_least(1), 64)


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        token_s: width of the single representation s.
        token_z: width of the pair representation z.
        num_bins: distogram bins.
        recycling_steps: the most recycling steps; training draws 0 ... this many, validation takes this many.
        msa: the MSA module.
        pairformer: the Pairformer.
        atoms: the atom encoders and the decoder.
        diffusion: the diffusion module and its process.
        template: the template module.
        confidence: the confidence module.
        features: those that its weights are trained with, one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
        init_from: checkpoint of the boltz package or of a run, from which a new run takes its weights; None draws them.
        init_weights: ``raw``, or ``ema`` for their moving average.
        init_skip: modules, under Boltz-2's names, that start from fresh weights all the same.
    """

    token_s: int = key(at_least(1), 384)
    token_z: int = key(at_least(1), 128)
    num_bins: int = 64
    recycling_steps: int = key(at_least(0), 3)
    msa: MSAConfig = field(default_factory=MSAConfig)
    pairformer: PairformerConfig = field(default_factory=PairformerConfig)
    atoms: AtomConfig = field(default_factory=AtomConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
    features: str = key(one_of(*FEATURE_SETS), BOLTZ2)
    init_from: str | None = None
    init_weights: str = key(one_of(*WEIGHTS), "raw")
    init_skip: list[str] = field(default_factory=list)
