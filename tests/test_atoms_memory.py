"""What a rank holds and sends for its atoms, in a simulated world."""

import multiprocessing as mp

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cpfold_train.data.schema import FEATURES
from cpfold_train.model.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from cpfold_train.model.atom_encoder import AtomEncoder
from cpfold_train.model.config import AtomConfig, MemoryConfig
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.simulate import LiveMemory

TOKENS, ATOMS, SAMPLES = 768, 6144, 4
FEATURES_OF_ATOMS = """
ref_pos ref_charge ref_element ref_atom_name_chars ref_space_uid atom_to_token atom_pad_mask atoms_per_token
"""
TOKEN_S, TOKEN_Z, CONFIG = 384, 128, AtomConfig(atom_encoder_depth=1, atom_decoder_depth=1)
HEADS = CONFIG.atom_encoder_depth * CONFIG.atom_encoder_heads


def features(grid):
    """A complex with eight atoms in each token; what says how much travels is real."""
    sizes = {"token": TOKENS, "atom": ATOMS}
    used = {name: feature for name, feature in FEATURES.items() if name in FEATURES_OF_ATOMS.split()}
    return {name: torch.zeros(1, *f.shape(sizes, grid), dtype=f.torch_dtype) for name, f in used.items()}


class Encode(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = AtomEncoder(CONFIG, TOKEN_S, TOKEN_Z, True)

    def forward(self, feats, cp, given):
        return self.encoder(feats, cp, given["s"], given["z"])


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = AtomAttentionEncoder(CONFIG, TOKEN_S, True, MemoryConfig())
        self.decoder = AtomAttentionDecoder(CONFIG, TOKEN_S, MemoryConfig())

    def forward(self, feats, cp, given):
        a, q, c = self.encoder(feats, given["q"], given["c"], given["bias"], cp, given["r"], SAMPLES)
        return [self.decoder(a, q, c, given["bias"], feats, cp)]


def measured(part, shape, answer):
    """Peak of live bytes above inputs and weights, forward and backward, and bytes sent, of a rank in the middle."""
    grid = Grid(*shape, 1, shape[0] * shape[1] // 2)
    own = ATOMS // grid.cp_size
    start = np.arange(TOKENS + 1, dtype=np.int32)[None] * (ATOMS // TOKENS)
    with fake_world(grid) as cp, FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        given = {"z": torch.empty(1, TOKENS // grid.rows, TOKENS // grid.cols, TOKEN_Z)}
        given |= {"s": torch.empty(1, TOKENS, TOKEN_S), "bias": torch.empty(1, own // 32, 32, 128, HEADS)}
        given |= {name: torch.empty(1, own, CONFIG.atom_s) for name in "qc"}
        given = {name: x.requires_grad_() for name, x in given.items()} | {"r": torch.empty(SAMPLES, own, 3)}
        feats = {**features(grid), "token_atom_start": start}
        module, before = part(), memory.now
        memory.reset()
        torch.autograd.backward([out.sum() for out in module(feats, cp, given)])
        answer.put((memory.peak - before, cp.ledger.total().sent_bytes))


def measure_elsewhere(part, shape):
    """A simulated world wants a process of its own."""
    context = mp.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=measured, args=(part, shape, answer))
    process.start()
    result = answer.get(timeout=120)
    process.join()
    return result


def test_memory_falls_with_the_number_of_ranks():
    """But for blocks, gradients of weights and, in the encoder, the gradient of s, which every rank has whole."""
    (few, _), (many, _) = (measure_elsewhere(Encode, shape) for shape in ((2, 2), (4, 4)))
    assert few > 90e6 and many < few / 4 + 10e6
    (few, sent), (many, sent_of_many) = (measure_elsewhere(Attend, shape) for shape in ((2, 2), (4, 4)))
    assert few > 80e6 and many < few / 4 + 20e6
    # Keys and values of 48 atoms on either side: forward, again in recomputation, and their gradients.
    halo = SAMPLES * 2 * 48 * 2 * CONFIG.atom_s * 4
    # Besides, the tokens and the mask at the ends of the shard.
    assert 6 * halo <= sent < 6.3 * halo and 6 * halo <= sent_of_many < 6.3 * halo
