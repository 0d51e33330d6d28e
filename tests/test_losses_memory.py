"""What a rank holds while it computes a loss, in a simulated world: blocks of rows, and tiles only of logits."""

import multiprocessing as mp

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cpfold_train.kernels.by_rows import BLOCK_BYTES
from cpfold_train.losses.symmetry import matched_truth
from cpfold_train.parallel.context import fake_world
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.bench.simulate import LiveMemory
from tests.complexes import LOGITS, SAMPLES
from tests.test_losses import USES, one_loss

TOKENS, ATOMS, BINS = 384, 3072, 64


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
    whole = dict.fromkeys(["asym_id", "mol_type", "token_to_rep_atom", "token_to_center_atom"], torch.long)
    feats = {name: torch.zeros(1, *n, dtype=dtype) for name, dtype in whole.items()}
    feats |= {name: torch.zeros(1, *n) for name in ("token_pad_mask", "token_resolved_mask")}
    feats |= {name: torch.zeros(1, *a) for name in ("atom_resolved_mask", "bfactor")}
    feats |= {"frames_idx": torch.zeros(1, *n, 3, dtype=torch.long), "coords": torch.zeros(1, *a, 3)}
    feats["atom_to_token"] = torch.zeros(1, *a, dtype=torch.long)
    feats |= {"atom_pad_mask": torch.zeros(1, *a), "ref_space_uid": torch.zeros(1, *a, dtype=torch.long)}
    feats |= {"copy_coords": torch.zeros(1, *a, 3, 3), "copy_resolved": torch.zeros(1, *a, 3)}
    feats |= {"atom_swaps": torch.zeros(1, *a, 4), "chain_copies": torch.zeros(1, 6, 3, dtype=torch.long)}
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
