"""How much arithmetic a training step needs: the matrix products of the model, without what is computed twice.

By it the throughput of a run is compared with the peak of its devices (MFU, model FLOPs utilisation; Chowdhery et al.,
"PaLM", 2022, appendix B): a backward pass counts as twice its forward pass, recycling passes without gradients as one
forward pass, and recomputation not at all. A product of (m, k) and (k, n) is 2 m k n operations.
"""

from __future__ import annotations

from typing import NamedTuple

from cpfold_train.model.config import AtomConfig, ConfidenceConfig, ModelConfig
from cpfold_train.model.msa import OPM_WIDTH, PWA_HEADS, PWA_WIDTH
from cpfold_train.ops.window_attention import WINDOW_KEYS
from cpfold_train.vocabulary import NUM_TOKENS


class SampleSizes(NamedTuple):
    """Of a batch of complexes, padding included: B complexes of N tokens, S alignment rows, A atoms, T templates."""

    batch: int
    tokens: int
    msa_rows: int
    atoms: int
    templates: int


class Passes(NamedTuple):
    """How often a step runs which part.

    Attributes:
        recycling: passes through the trunk without gradients.
        multiplicity: noised copies of each complex.
        sampling_steps, samples: of the structures sampled for the confidence module.
        confidence: whether it is trained; if not, nothing is sampled.
    """

    recycling: int
    multiplicity: int
    sampling_steps: int
    samples: int
    confidence: bool


def step_flops(model: ModelConfig, sizes: SampleSizes, passes: Passes) -> float:
    """Operations of one micro-batch, forward and backward, of all ranks of the grid together."""
    n, pairs, cycle = sizes.tokens, sizes.tokens**2, trunk_flops(model, sizes)
    embedding = input_flops(model, sizes) + 2 * pairs * model.token_z * model.num_bins
    conditioning = conditioning_flops(model, sizes)
    denoising = denoising_flops(model, sizes)
    trained = embedding + cycle + conditioning + passes.multiplicity * denoising
    total = 3 * trained + passes.recycling * cycle
    if passes.confidence:
        sampled = conditioning + passes.sampling_steps * passes.samples * denoising
        total += sampled + 3 * confidence_flops(model.token_s, model.token_z, n, model.confidence, passes.samples)
    return sizes.batch * total


def trunk_flops(model: ModelConfig, sizes: SampleSizes) -> float:
    """One pass through templates, MSA module and Pairformer, forward, of one complex."""
    n, pairs, s, c = sizes.tokens, sizes.tokens**2, sizes.msa_rows, model.token_z
    msa, template, pairformer = model.msa, model.template, model.pairformer
    recycled = 2 * pairs * c**2 + 2 * n * model.token_s**2

    dim = template.template_dim
    pair_stack = pair_stack_flops(n, dim, template.pairwise_num_heads, template.pairwise_head_width)
    one_template = 2 * pairs * (c + 3) * dim + template.template_blocks * pair_stack
    templates = sizes.templates * one_template + 2 * pairs * dim * c

    width, m = PWA_HEADS * PWA_WIDTH, msa.msa_s
    averaging = 2 * s * n * 3 * width * m + 2 * pairs * c * PWA_HEADS + 2 * pairs * s * width
    outer_product = 2 * s * n * m * 2 * OPM_WIDTH + 2 * pairs * OPM_WIDTH**2 * (s + c)
    block = averaging + outer_product + transition_flops(s * n, m, 4 * m)
    block += pair_stack_flops(n, c, msa.pairwise_num_heads, msa.pairwise_head_width)
    alignment = 2 * n * (model.token_s + 3 * s) * m + msa.msa_blocks * block
    one_block = pairformer_block_flops(
        n, model.token_s, c, pairformer.num_heads, pairformer.pairwise_num_heads, pairformer.pairwise_head_width
    )
    return recycled + templates + alignment + pairformer.num_blocks * one_block


def pair_stack_flops(n: int, c: int, heads: int, width: int) -> float:
    """Two triangle multiplications, two triangle attentions and the transition, of n tokens and c channels."""
    multiplication = 2 * n**2 * 6 * c**2 + 2 * n**3 * c
    attention = 2 * n**2 * c * (heads + 5 * heads * width) + 4 * n**3 * heads * width
    return 2 * (multiplication + attention) + transition_flops(n**2, c, 4 * c)


def pairformer_block_flops(n: int, token_s: int, token_z: int, heads: int, pair_heads: int, width: int) -> float:
    """The pair stack, and attention and transition of the single representation."""
    attention = 5 * 2 * n * token_s**2 + 2 * n**2 * token_z * heads + 4 * n**2 * token_s
    single = attention + transition_flops(n, token_s, 4 * token_s)
    return pair_stack_flops(n, token_z, pair_heads, width) + single


def transition_flops(rows: int, dim: int, hidden: int) -> float:
    """Three products of each row."""
    return 3 * 2 * rows * dim * hidden


def input_flops(model: ModelConfig, sizes: SampleSizes) -> float:
    """Atoms, tokens and their pairs before the first pass through the trunk."""
    n, token_s, atoms = sizes.tokens, model.token_s, model.atoms
    depth, heads = atoms.atom_encoder_depth, atoms.atom_encoder_heads
    bias = 2 * sizes.atoms * WINDOW_KEYS * atoms.atom_z * depth * heads
    encoder = atom_pair_flops(atoms, sizes.atoms) + bias + atom_transformer_flops(atoms, sizes.atoms, depth)
    tokens = 2 * n * (2 * NUM_TOKENS + 2 + token_s + 2 * model.token_z) * token_s
    # Bonds, and the class, threshold and Fourier features of contacts.
    pairs = 2 * n**2 * (1 + 3 + 1 + model.token_z) * model.token_z
    return encoder + 2 * sizes.atoms * atoms.atom_s * token_s + tokens + pairs


def conditioning_flops(model: ModelConfig, sizes: SampleSizes) -> float:
    """What all diffusion samples of a complex have in common, the biases of all layers included."""
    pairs, c, atoms, diffusion = sizes.tokens**2, model.token_z, model.atoms, model.diffusion
    conditioner = 2 * pairs * 2 * c * c + diffusion.conditioning_transition_layers * transition_flops(pairs, c, 2 * c)
    of_tokens = 2 * sizes.tokens * model.token_s * atoms.atom_s + 2 * pairs * c * atoms.atom_z
    layers = atoms.atom_encoder_depth * atoms.atom_encoder_heads + atoms.atom_decoder_depth * atoms.atom_decoder_heads
    biases = 2 * sizes.atoms * WINDOW_KEYS * atoms.atom_z * layers
    biases += 2 * pairs * c * diffusion.token_transformer_depth * diffusion.token_transformer_heads
    return conditioner + atom_pair_flops(atoms, sizes.atoms) + of_tokens + biases


def denoising_flops(model: ModelConfig, sizes: SampleSizes) -> float:
    """One sample through the diffusion module."""
    n, atoms, diffusion = sizes.tokens, model.atoms, model.diffusion
    dim = 2 * model.token_s
    single = 2 * n * dim**2 + diffusion.conditioning_transition_layers * transition_flops(n, dim, 2 * dim)
    to_tokens = 2 * sizes.atoms * atoms.atom_s * (3 + dim + 3) + 2 * n * dim * (dim + atoms.atom_s)
    transformer = diffusion.token_transformer_depth * transformer_layer_flops(n, dim, n)
    depth = atoms.atom_encoder_depth + atoms.atom_decoder_depth
    return single + to_tokens + transformer + atom_transformer_flops(atoms, sizes.atoms, depth)


def transformer_layer_flops(rows: int, dim: int, keys: int) -> float:
    """A layer of the diffusion transformer: attention to ``keys`` others and transition, each conditioned."""
    attention = (5 + 2 + 1) * 2 * rows * dim**2 + 4 * rows * keys * dim
    return attention + (2 + 1 + 4 + 2 + 2) * 2 * rows * dim**2


def atom_transformer_flops(atoms: AtomConfig, count: int, depth: int) -> float:
    """Attention of ``count`` atoms within windows."""
    return depth * transformer_layer_flops(count, atoms.atom_s, WINDOW_KEYS)


def atom_pair_flops(atoms: AtomConfig, count: int) -> float:
    """The encoder of atoms and of their pairs in windows, from reference conformers."""
    pairs, c = count * WINDOW_KEYS, atoms.atom_z
    return 2 * count * atoms.atom_s * (3 + 2 * c) + 2 * pairs * c * (3 + 1 + 1 + 3 * c)


def confidence_flops(token_s: int, token_z: int, n: int, confidence: ConfidenceConfig, samples: int) -> float:
    """Sampled structures of one complex through the confidence module; what they have in common is embedded once."""
    pairs, pairformer = n**2, confidence.pairformer
    embedding = 2 * n * token_s * (token_s + 4 * token_z) + 2 * pairs * (token_z + 1 + 4 + token_z) * token_z
    heads = 2 * pairs * token_z * 2 * (confidence.num_pae_bins + confidence.num_pde_bins)
    heads += 2 * n * token_s * (confidence.num_plddt_bins + 2)
    one_block = pairformer_block_flops(
        n, token_s, token_z, pairformer.num_heads, pairformer.pairwise_num_heads, pairformer.pairwise_head_width
    )
    return embedding + samples * (heads + pairformer.num_blocks * one_block)
