"""Sizes of the model. The defaults are Boltz-2's; the presets are in ``conf/model``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MSAConfig:
    """The MSA module: width of m, blocks, dropout of m and of z, and the triangle attention inside."""

    msa_s: int = 64
    msa_blocks: int = 4
    msa_dropout: float = 0.15
    z_dropout: float = 0.25
    pairwise_head_width: int = 32
    pairwise_num_heads: int = 4


@dataclass
class PairformerConfig:
    """The Pairformer: blocks, heads of the single attention, dropout of z, and the triangle attention inside."""

    num_blocks: int = 64
    num_heads: int = 16
    dropout: float = 0.25
    pairwise_head_width: int = 32
    pairwise_num_heads: int = 4


@dataclass
class AtomConfig:
    """Atoms: width of their representation and of that of their pairs, and layers and heads of each encoder's and of
    the decoder's attention within windows."""

    atom_s: int = 128
    atom_z: int = 16
    atom_encoder_depth: int = 3
    atom_encoder_heads: int = 4
    atom_decoder_depth: int = 3
    atom_decoder_heads: int = 4


@dataclass
class TemplateConfig:
    """The template module: width of its pair representation, blocks, their dropout and triangle attention."""

    template_dim: int = 64
    template_blocks: int = 2
    dropout: float = 0.25
    pairwise_head_width: int = 32
    pairwise_num_heads: int = 4


@dataclass
class ConfidenceConfig:
    """The confidence module: its Pairformer, and the bins of predicted distances and of what the heads predict."""

    pairformer: PairformerConfig = field(default_factory=lambda: PairformerConfig(num_blocks=8))
    num_dist_bins: int = 64
    max_dist: float = 22.0
    num_plddt_bins: int = 50
    num_pde_bins: int = 64
    num_pae_bins: int = 64


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        token_s: width of the single representation s.
        token_z: width of the pair representation z.
        num_bins: distogram bins.
        recycling_steps: the most recycling steps; training draws 0 ... this many, validation takes this many.
        checkpoint_blocks: recompute each block in the backward pass, so that only z, s and m between blocks are kept.
        msa: the MSA module.
        pairformer: the Pairformer.
        atoms: the atom encoders and the decoder.
        template: the template module.
        confidence: the confidence module.
    """

    token_s: int = 384
    token_z: int = 128
    num_bins: int = 64
    recycling_steps: int = 3
    checkpoint_blocks: bool = True
    msa: MSAConfig = field(default_factory=MSAConfig)
    pairformer: PairformerConfig = field(default_factory=PairformerConfig)
    atoms: AtomConfig = field(default_factory=AtomConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
