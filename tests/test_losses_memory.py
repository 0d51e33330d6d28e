"""What a rank holds while it computes a loss, in a simulated world: blocks of rows, and tiles only of logits."""

import multiprocessing as mp

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cpfold_train.data.schema import FEATURES
from cpfold_train.kernels.by_rows import BLOCK_BYTES
from cpfold_train.losses.symmetry import matched_truth
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.simulate import LiveMemory
from tests.complexes import LOGITS, SAMPLES
from tests.test_losses import USES, one_loss

TOKENS, ATOMS, BINS = 384, 3072, 64
FEATURES_OF_LOSSES = """
asym_id mol_type token_to_rep_atom token_to_center_atom token_pad_mask token_resolved_mask frames_idx chain_copies
atom_resolved_mask bfactor coords atom_to_token atom_pad_mask ref_space_uid copy_coords copy_resolved atom_swaps
"""


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor))])
        return out


def inputs(grid, tokens, atoms):
    """Features and predictions of one sample for a rank, all zero."""
    n, a = (tokens,), (atoms // grid.cp_size,)
    tile = tokens // grid.rows, tokens // grid.cols
    sizes = {"token": tokens, "atom": atoms, "chain": 6, "copy": 3, "order": 4}
    used = {name: feature for name, feature in FEATURES.items() if name in FEATURES_OF_LOSSES.split()}
    feats = {name: torch.zeros(1, *f.shape(sizes, grid), dtype=f.torch_dtype) for name, f in used.items()}
    given = {name: torch.zeros(SAMPLES, *a, 3) for name in ("pred_coords", "turned_coords", "true_coords")}
    given |= {
        "sigmas": torch.zeros(SAMPLES),
        "bfactor": torch.zeros(1, *n, BINS),
        "resolved": torch.zeros(SAMPLES, *n, 2),
    }
    given |= {"true_resolved": torch.zeros(SAMPLES, *a), "plddt": torch.zeros(SAMPLES, *n, BINS)}
    return feats, given | {name: torch.zeros(SAMPLES, *tile, BINS) for name in ("pde", "pae")}


def measured(shape, tokens, atoms, answer):
    """By loss: the most elements of a tensor and the peak of live bytes above the inputs, forward and backward."""
    found = {}
    with fake_world(Grid(*shape)) as cp, FakeTensorMode(allow_non_fake_inputs=True):
        for name in USES | LOGITS:
            with LiveMemory() as memory, Largest() as largest:
                feats, given = inputs(cp.grid, tokens, atoms)
                leaf = given[USES.get(name, name)].requires_grad_()
                largest.numel, before = 0, memory.now
                memory.reset()
                one_loss(name, feats, given, cp).sum().backward()
                found[name] = largest.numel, memory.peak - before, leaf.numel()
        with LiveMemory() as memory, Largest() as largest:
            feats, given = inputs(cp.grid, tokens, atoms)
            largest.numel, before = 0, memory.now
            memory.reset()
            matched_truth(given["pred_coords"], feats, cp)
            found["matched_truth"] = largest.numel, memory.peak - before, 0
    answer.put(found)


def measure_elsewhere(shape, tokens=TOKENS, atoms=ATOMS):
    """A simulated world wants a process of its own."""
    context = mp.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=measured, args=(shape, tokens, atoms, answer))
    process.start()
    result = answer.get(timeout=120)
    process.join()
    return result


@pytest.mark.parametrize("shape", [(2, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_no_rank_holds_all_pairs(shape):
    for name, (largest, peak, leaf) in measure_elsewhere(shape).items():
        gathered = SAMPLES * ATOMS * 7
        assert gathered + BLOCK_BYTES // 4 < ATOMS**2 / 8
        block = max(gathered, BLOCK_BYTES // 4)
        assert largest <= max(block, leaf), name
        # Logits, as fp32 and as their gradient, and as many blocks as are live at a time.
        assert peak < 4 * (leaf + 8 * block), name
