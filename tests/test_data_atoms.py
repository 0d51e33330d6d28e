"""Atom features and local frames against the structure they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cpfold_train.data.features.atoms import atom_features, crop_atoms, rotation_matrices
from cpfold_train.data.features.frames import frame_features
from cpfold_train.data.stream.batch import make_crop
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.parallel.gather import gather_tensor
from cpfold_train.parallel.grid import Grid


@pytest.fixture(scope="module")
def samples():
    return {entry.key: entry for entry in open_shards(["tests/data/*.tar"])}


@pytest.fixture(scope="module", params=["4hhb", "3l4q", "7pzb"])
def structure(request, samples):
    return read_sample(samples[request.param])[0]


def moved(structure, tokens, seed=0):
    atoms = crop_atoms(structure, tokens)
    motions = np.random.default_rng(seed).normal(size=(atoms.residue[-1] + 1, 7))
    return atoms, atom_features(structure, atoms, motions, (0, len(atoms.atom)))


def test_atoms_of_a_crop(structure):
    tokens = np.flatnonzero(np.random.default_rng(1).random(len(structure)) < 0.5)
    atoms, features = moved(structure, tokens)
    np.testing.assert_array_equal(atoms.atom, np.flatnonzero(np.isin(structure.atom_token, tokens)))
    np.testing.assert_array_equal(tokens[features["atom_to_token"]], structure.atom_token[atoms.atom])
    np.testing.assert_array_equal(features["bfactor"], structure.b_factor[atoms.atom])
    names = structure.comp_atom_name[structure.ref_atom[atoms.atom]]
    spelled = ["".join(chr(32 + code) for code in row if code) for row in features["ref_atom_name_chars"]]
    assert spelled == names.astype(str).tolist()
    np.testing.assert_array_equal(features["ref_element"] == 6, np.char.startswith(names, b"C"))
    known = features["atom_resolved_mask"] == 1
    np.testing.assert_allclose(features["coords"][known].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(
        np.diff(features["coords"][known], axis=0),
        np.diff(structure.coords[atoms.atom][known], axis=0),
        atol=1e-4,
    )
    assert not features["coords"][~known].any()


def test_each_residue_is_turned_as_a_whole_and_by_itself(structure):
    """Its shape stays, its middle is the shift, no two neighbours turn alike, and the last one turns too."""
    _, features = moved(structure, np.arange(len(structure)))
    _, again = moved(structure, np.arange(len(structure)), seed=1)
    uid, pos = features["ref_space_uid"], features["ref_pos"].astype(np.float64)
    original = structure.comp_pos[structure.ref_atom].astype(np.float64)
    shifts = np.random.default_rng(0).normal(size=(uid[-1] + 1, 7))[:, 4:]
    turns = []
    for residue in range(uid[-1] + 1):
        own = uid == residue
        centred = original[own] - original[own].mean(0)
        np.testing.assert_allclose(pos[own].mean(0), shifts[residue], atol=1e-4)
        turn = np.linalg.lstsq(centred, pos[own] - shifts[residue], rcond=None)[0].T
        np.testing.assert_allclose(centred @ turn.T + shifts[residue], pos[own], atol=1e-4)
        if np.linalg.matrix_rank(centred, tol=0.1) == 3:
            np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-4)
            assert abs(np.linalg.det(turn) - 1) < 1e-4
            turns.append(turn)
    assert len(turns) > 400 and np.abs(np.diff(turns, axis=0)).max(axis=(1, 2)).min() > 1e-3
    assert (np.abs(again["ref_pos"] - features["ref_pos"]).max(axis=1) > 1e-6).all()


def test_rotations_are_uniform():
    turns = rotation_matrices(np.random.default_rng(0).normal(size=(20_000, 4)))
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-12)
    np.testing.assert_allclose(turns.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose((turns**2).mean(axis=0), 1 / 3, atol=0.01)


def test_conformers_move_again_in_each_epoch(samples):
    sample = read_sample(samples["3l4q"])
    first, again, later = (
        make_crop(*sample, crop_size=99, max_msa_rows=4, draw=(0, epoch, 5)).motions for epoch in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[:50] - later[:50]).min() > 0


def test_frames_of_polymers(structure):
    tokens = np.arange(30, len(structure))
    atoms = crop_atoms(structure, tokens)
    frames = frame_features(structure, tokens, atoms)
    names = structure.comp_atom_name[structure.ref_atom[atoms.atom]][frames["frames_idx"]]
    mol_type = structure.chains["mol_type"][structure.asym_id[tokens]]
    assert (names[mol_type == 0] == [b"N", b"CA", b"C"]).all()
    assert (names[mol_type == 1] == [b"C1'", b"C3'", b"C4'"]).all()
    known = structure.resolved[atoms.atom][frames["frames_idx"]].all(axis=1)
    np.testing.assert_array_equal(frames["frame_resolved_mask"][mol_type < 3], known[mol_type < 3])
    assert (atoms.token[frames["frames_idx"]][mol_type < 3] == np.flatnonzero(mol_type < 3)[:, None]).all()


@pytest.mark.parametrize("key", ["4hhb", "7pzb"])
def test_frames_of_ligands(samples, key):
    """Each atom with the two nearest resolved ones of its chain, by all distances; none where these are in line."""
    rng = np.random.default_rng(0)
    structure, *_ = read_sample(samples[key])
    resolved = structure.resolved & (rng.random(len(structure.resolved)) < 0.8)
    structure = replace(structure, resolved=resolved)
    tokens = np.flatnonzero(rng.random(len(structure)) < 0.8)
    atoms = crop_atoms(structure, tokens)
    frames = frame_features(structure, tokens, atoms)
    coords, resolved = structure.coords[atoms.atom].astype(np.float64), structure.resolved[atoms.atom]
    checked = 0
    for token in np.flatnonzero(~structure.polymer[tokens]):
        own = atoms.start[token]
        chain = np.flatnonzero(structure.asym_id[tokens][atoms.token] == structure.asym_id[tokens[token]])
        others = chain[resolved[chain] & (chain != own)]
        if not resolved[own] or len(others) < 2:
            assert frames["frame_resolved_mask"][token] == 0
            continue
        apart = np.linalg.norm(coords[others] - coords[own], axis=1)
        first, second = others[np.argsort(apart)[:2]]
        assert frames["frames_idx"][token].tolist() == [first, own, second]
        sides = coords[[first, second]] - coords[own]
        angle = np.degrees(np.arccos((sides[0] @ sides[1]) / np.prod(np.linalg.norm(sides, axis=1))))
        assert frames["frame_resolved_mask"][token] == (25 < angle < 155)
        checked += 1
    assert checked >= 3


def test_atoms_in_line_span_no_frame(samples):
    structure, *_ = read_sample(samples["4hhb"])
    first = structure.atom_start[0]
    coords = structure.coords.copy()
    coords[first : first + 3] = [[0, 0, 0], [1.4, 0, 0], [2.9, 0.1, 0]]
    line = replace(structure, coords=coords)
    masks = [
        frame_features(x, np.arange(5), crop_atoms(x, np.arange(5)))["frame_resolved_mask"] for x in (structure, line)
    ]
    assert masks[0].tolist() == [1] * 5 and masks[1].tolist() == [0, 1, 1, 1, 1]


def shares_joined(cp, count):
    """What a DTensor of this rank's part takes the whole to be."""
    share = torch.arange(*cp.grid.atoms(count))[None]
    assert cp.sharded(share).shape == (1, count)
    # The mesh has no process groups with which torch could join them.
    return gather_tensor(share[0], cp.all).flatten()[None]


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (2, 3)])
def test_shares_of_ranks_are_in_order(ranks, shape):
    count = Grid(*shape).pad_atoms(1000)
    assert count % (32 * shape[0] * shape[1]) == 0 and count - 1000 < 32 * shape[0] * shape[1]
    for joined in ranks.run(shares_joined, *shape, count):
        assert joined.tolist() == [list(range(count))]
