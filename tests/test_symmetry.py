"""The truth named as a prediction has it: data, chains, residues and ligands; on every grid the same."""

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from cpfold_train.data.features import msa
from cpfold_train.data.features.atoms import crop_atoms
from cpfold_train.data.features.symmetry import find_symmetry
from cpfold_train.data.schema import ATOMS, FEATURES
from cpfold_train.data.stream.batch import make_crop, tile_features
from cpfold_train.data.structures.automorphisms import MOST, automorphisms
from cpfold_train.data.structures.components import component
from cpfold_train.losses.symmetry import matched_truth
from cpfold_train.parallel.grid import Grid, split
from tests.complexes import structure_of

NAMES = """
asym_id token_pad_mask token_to_center_atom chain_copies atom_to_token atom_pad_mask ref_space_uid copy_coords
copy_resolved atom_swaps
"""


def symmetries(name, linked=()):
    """Names of the atoms that each symmetry of a component moves."""
    found = component(name)
    names = found.names.astype(str)
    bonds = tuple((int(i), int(j), int(kind)) for (i, j), kind in zip(found.bonds, found.bond_types))
    links = tuple(bool(atom in linked) for atom in names)
    moves = automorphisms(tuple(found.elements.tolist()), bonds, links, found.pos.tobytes())
    return [{a: b for a, b in zip(names, names[moved]) if a != b} for moved in moves]


@pytest.mark.parametrize(
    ("name", "count"),
    [("BNZ", 11), ("ATP", 7), ("HEM", 2), ("TFA", 3), ("CIT", 3), ("PEG", 1), ("INS", 0), ("NAG", 0), ("IHP", MOST)],
)
def test_symmetries_of_molecules(name, count):
    """Rings turn, carboxylates, phosphates and CF3 rotate; no stereocentre is inverted: not in sugars or inositol."""
    assert len(symmetries(name)) == count


def test_prochiral_and_linked_atoms_stay():
    assert symmetries("LEU") == [{"O": "OXT", "OXT": "O"}]
    assert {"O1": "O4", "C1": "C4", "C2": "C3", "C3": "C2", "C4": "C1", "O4": "O1"} in symmetries("PEG")
    assert not symmetries("PEG", linked=["O1"]) and not symmetries("PEG", linked=["O1", "O4"])


@cache
def crop(key, chains):
    """Some chains of an entry."""
    structure = structure_of(key)
    tokens = np.flatnonzero(np.isin(structure.asym_id, chains))
    atoms = crop_atoms(structure, tokens)
    whole = make_crop(structure, {}, crop_size=10_000, max_msa_rows=1, draw=(0, 0, 0))
    rows = msa.assemble(structure, tokens, {}, 1, np.random.default_rng(0))
    return replace(whole, tokens=tokens, atoms=atoms, rows=rows, symmetry=find_symmetry(structure, tokens, atoms))


CASES = {
    "all": [
        ("4hhb", {0: 2, 1: 1, 2: 0, 3: 3, 4: 5, 5: 6, 6: 7, 7: 4}),
        ("7pzb", {0: 1, 1: 0, 2: 4, 4: 2, 3: 3, 6: 7, 7: 6}),
    ],
    "copies outside the crop": [("4hhb", {2: 0, 6: 4}), ("7pzb", {1: 0, 3: 5, 7: 6})],
}
"""Which copy each chain of a crop is predicted as."""


def shuffled(feats, crops, copies, generator):
    """Where each atom of the crops is if chains are taken for copies and residues are named otherwise at random."""
    coords, resolved = [], []
    for b, (crop, copy_of) in enumerate(zip(crops, copies)):
        own = len(crop.atoms.atom)
        chain = torch.from_numpy(crop.structure.asym_id[crop.tokens][crop.atoms.token].astype(np.int64))
        table = feats["chain_copies"][b].long() - 1
        row = (table[:, 0] == chain[:, None]).long().argmax(1)
        taken = torch.tensor([copy_of[int(i)] for i in chain])
        copy = (table[row] == taken[:, None]).long().argmax(1)
        atom = torch.arange(own)
        order = torch.randint(feats["atom_swaps"].shape[2], (own,), generator=generator)
        source = atom + feats["atom_swaps"][b, atom, order[feats["ref_space_uid"][b, :own].long()]]
        missing = feats["atom_pad_mask"].shape[1] - own
        coords.append(pad(feats["copy_coords"][b, source, copy], [0, 0, 0, missing]))
        resolved.append(pad(feats["copy_resolved"][b, source, copy], [0, missing]) > 0)
    return torch.stack(coords).double(), torch.stack(resolved)


def match(cp, feats, pred):
    """This rank's part of the matched truth."""

    def own(x):
        return x[:, slice(*split(x.shape[1], cp.all.size)[cp.all.index])]

    feats = {name: own(x) if FEATURES[name].placement == ATOMS else x for name, x in feats.items()}
    return matched_truth(own(pred), feats, cp)


def features(crops):
    """Of both crops, padded for a grid of 2x3."""
    n, a = Grid(2, 3).pad_tokens(800), Grid(2, 3).pad_atoms(max(len(c.atoms.atom) for c in crops))
    others = tuple(map(max, zip(*(c.symmetry.sizes for c in crops))))
    alone = [tile_features(c, Grid(), n, 1, a, 1, others) for c in crops]
    return {name: torch.from_numpy(np.stack([x[name] for x in alone])) for name in NAMES.split()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_names_are_found(ranks, case, shape):
    """Of two predictions, turned and with noise, one has other names and one the names that the data came with."""
    keys, copies = zip(*CASES[case])
    crops = [crop(key, tuple(copy_of)) for key, copy_of in zip(keys, copies)]
    feats = features(crops)
    generator = torch.Generator().manual_seed(0)
    truth, resolved = shuffled(feats, crops, copies, generator)
    original = feats["copy_coords"][:, :, 0].double(), feats["copy_resolved"][:, :, 0] > 0
    wanted = torch.stack([truth, original[0]], 1).flatten(0, 1), torch.stack([resolved, original[1]], 1).flatten(0, 1)
    turn = torch.linalg.qr(torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)).Q
    turn = turn * torch.linalg.det(turn)[:, None, None]
    pred = (wanted[0] + 0.05 * torch.randn(wanted[0].shape, generator=generator, dtype=torch.float64)) @ turn + 7
    # Where nothing is known, anything may be predicted.
    pred = torch.where(wanted[1][..., None], pred, 30 * torch.randn(pred.shape, generator=generator).double())
    parts = ranks.run(match, *shape, feats, pred)
    coords, known = (torch.cat(x, 1) for x in zip(*parts))
    known &= feats["atom_pad_mask"].repeat_interleave(2, 0) > 0
    assert (known == wanted[1]).all()
    torch.testing.assert_close(coords[known], wanted[0][known])


def test_no_copy_is_taken_twice(ranks):
    """Two chains predicted in one position."""
    crops = [crop("4hhb", (0, 1, 2, 3))]
    feats = features(crops)
    one_place, resolved = shuffled(feats, crops, [{0: 0, 1: 1, 2: 0, 3: 3}], torch.Generator().manual_seed(0))
    assert resolved.any()
    ((coords, _),) = ranks.run(match, 1, 1, feats, one_place)
    token = feats["asym_id"].gather(1, feats["atom_to_token"].long())
    centres = [coords[(token == chain) & (feats["atom_pad_mask"] > 0)].sum(0) for chain in (0, 2)]
    assert not torch.allclose(*centres)


def test_symmetries_of_a_residue_are_combined(ranks):
    """Both carboxylates of a heme are in the other order. Each has a symmetry of its own, and none has both."""
    crops = [crop("4hhb", (0, 1, 4, 5))]
    feats = features(crops)
    swaps, residue = feats["atom_swaps"][0].long(), feats["ref_space_uid"][0].long()
    orders = Counter(own for own, _ in {(int(residue[atom]), order) for atom, order in swaps.nonzero().tolist()})
    heme = next(own for own, count in orders.items() if count == 2)
    both = torch.where(residue == heme, swaps.sum(1), 0)
    assert both.count_nonzero() == 4
    truth = feats["copy_coords"][:, :, 0].double()
    pred = truth[:, torch.arange(len(both)) + both]
    ((coords, _),) = ranks.run(match, 1, 1, feats, pred)
    known = feats["copy_resolved"][:, :, 0] > 0
    assert known[0, both != 0].all()
    torch.testing.assert_close(coords[known], pred[known])
