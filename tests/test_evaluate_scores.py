"""Scores of known changes to known structures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tmtools

from cpfold_train.data.features.atoms import rotation_matrices
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.errors import DataError
from cpfold_train.evaluate.interfaces import BACKBONE
from cpfold_train.evaluate.match import match
from cpfold_train.evaluate.scores import score
from cpfold_train.evaluate.superpose import superposition, tm_score
from cpfold_train.vocabulary import DNA
from tests.structures import make_chain, make_structure

SHARD = str(Path(__file__).parent / "data" / "train-000000.tar")
ROTATION = rotation_matrices(np.array([[0.3, -0.8, 0.1, 0.5]]))[0]


def sample_of(key):
    return read_sample(next(entry for entry in open_shards([SHARD]) if entry.key == key))[0]


@pytest.fixture(scope="module")
def haemoglobin():
    """Two chains of each of two kinds, and four haems."""
    return sample_of("4hhb")


@pytest.fixture(scope="module")
def with_dna():
    return sample_of("7pzb")


def moved(structure, change):
    """A prediction: everything is resolved, and ``change(coords, chain of each atom)`` has been done to it."""
    chain = structure.asym_id[structure.atom_token]
    return replace(structure, coords=change(structure.coords.astype(np.float64), chain).astype(np.float32))


def swapped(structure, first, second):
    """The same atoms, with two identical chains in each other's place."""
    token = structure.atom_token
    coords, resolved = structure.coords.copy(), structure.resolved.copy()
    a, b = (np.flatnonzero(structure.asym_id[token] == chain) for chain in (first, second))
    assert len(a) == len(b)
    coords[a], coords[b] = structure.coords[b], structure.coords[a]
    resolved[a], resolved[b] = structure.resolved[b], structure.resolved[a]
    return replace(structure, coords=coords, resolved=resolved)


@pytest.mark.parametrize("name", ["haemoglobin", "with_dna"])
def test_rigid_motion_changes_nothing(name, request):
    structure = request.getfixturevalue(name)
    scores = score(structure, moved(structure, lambda coords, _: coords @ ROTATION + 40))
    assert scores.lddt == scores.interface_lddt == scores.fnat == 1
    assert scores.tm_score == pytest.approx(1, abs=1e-6)
    assert max(scores.rmsd, scores.ligand_rmsd) < 1e-3
    assert scores.dockq == pytest.approx(1, abs=1e-6)
    assert scores.chains == len(structure.meta["chains"])
    assert scores.atoms == 1


@pytest.mark.parametrize("name", ["haemoglobin", "with_dna"])
def test_identical_chains_may_change_places(name, request):
    structure = request.getfixturevalue(name)
    chains = structure.meta["chains"]
    predicted = structure
    for entity in {chain["entity"] for chain in chains}:
        copies = [number for number, chain in enumerate(chains) if chain["entity"] == entity]
        if len(copies) > 1:
            predicted = swapped(predicted, copies[0], copies[1])
    predicted = moved(predicted, lambda coords, _: coords @ ROTATION)
    scores = score(structure, predicted)
    assert scores.rmsd < 1e-3
    assert scores.lddt > 0.999
    assert scores.dockq > 0.999
    assert scores.ligand_rmsd < 1e-3
    assert any(chain != partner for chain, partner in match(structure, predicted).partners.items())


def test_a_mirror_image_is_not_a_motion(haemoglobin):
    scores = score(haemoglobin, moved(haemoglobin, lambda coords, _: coords * (-1, 1, 1)))
    assert scores.rmsd > 5
    assert scores.tm_score < 0.5
    assert scores.lddt == pytest.approx(1, abs=0.01), "distances are those of the mirror image"


def test_a_shifted_chain_costs_the_interface(haemoglobin):
    def pull(coords, chain):
        return coords + 12.0 * (chain == 0)[:, None]

    scores = score(haemoglobin, moved(haemoglobin, pull))
    assert scores.interface_lddt < 0.8
    assert scores.lddt > scores.interface_lddt
    # The two halves are alike: the one with the shifted chain may be taken for A and B or for C and D.
    halves = [pair for pair in scores.interfaces if pair["chains"] in ("A-B", "C-D")]
    broken, whole = sorted(halves, key=lambda pair: pair["dockq"])
    assert broken["fnat"] == 0
    assert broken["dockq"] < 0.35
    assert whole["dockq"] > 0.97
    # The haem of the shifted chain did not go along.
    *others, lost = sorted(ligand["rmsd"] for ligand in scores.ligands)
    assert lost > 5
    assert max(others) < 2


def test_the_smaller_chain_is_seen_from_the_larger_one(haemoglobin):
    """Of an alpha and a beta chain alone, the alpha chain, which is the smaller one, turns about its middle."""
    chain = haemoglobin.asym_id[haemoglobin.atom_token]
    truth = replace(haemoglobin, resolved=haemoglobin.resolved & np.isin(chain, (0, 1)))
    middle = truth.coords[truth.resolved & (chain == 0)].mean(axis=0)

    def turn(coords, chain):
        return np.where((chain == 0)[:, None], (coords - middle) @ ROTATION + middle, coords)

    predicted = moved(truth, turn)
    matched = match(truth, predicted)
    backbone = (matched.chain == 0) & np.isin(matched.name, BACKBONE)
    expected = np.sqrt(((matched.predicted - matched.truth)[backbone] ** 2).sum(axis=1).mean())
    (pair,) = score(truth, predicted).interfaces
    assert pair["lrmsd"] == pytest.approx(expected)


def test_a_ligand_out_of_its_pocket(with_dna):
    ligand = next(n for n, chain in enumerate(with_dna.meta["chains"]) if chain["type"] == "nonpolymer")
    predicted = moved(with_dna, lambda coords, chain: coords + (3.0, 0, 0) * (chain == ligand)[:, None])
    scores = score(with_dna, predicted)
    assert scores.ligands[0]["rmsd"] == pytest.approx(3, abs=1e-3)
    assert scores.ligands[1]["rmsd"] < 1e-3
    assert scores.dockq == pytest.approx(1, abs=1e-6)


def test_noise_costs_more_the_louder_it_is(haemoglobin):
    noise = np.random.default_rng(0).normal(size=haemoglobin.coords.shape)
    quiet, loud = (score(haemoglobin, moved(haemoglobin, lambda x, _, s=s: x + s * noise)) for s in (0.3, 3.0))
    assert quiet.rmsd == pytest.approx(0.3 * np.sqrt(3), rel=0.1)
    assert loud.rmsd == pytest.approx(3 * np.sqrt(3), rel=0.1)
    for name in ("lddt", "tm_score", "interface_lddt", "fnat", "dockq"):
        assert getattr(quiet, name) > getattr(loud, name)


def test_a_prediction_that_is_torn_apart_is_scored(haemoglobin):
    """An untrained model spreads its atoms over thousands of Angstrom, with cells of 5 Angstrom for 25 GiB."""
    spread = score(haemoglobin, moved(haemoglobin, lambda coords, _: 300 * coords))
    assert spread.rmsd > 1000 and all(pair["fnat"] == 0 for pair in spread.interfaces)


def test_atoms_that_one_side_lacks_are_left_out(haemoglobin):
    resolved = haemoglobin.resolved & (np.random.default_rng(1).random(len(haemoglobin.resolved)) < 0.7)
    scores = score(haemoglobin, replace(haemoglobin, resolved=resolved))
    assert scores.lddt == 1
    assert scores.rmsd < 1e-6
    assert scores.atoms == pytest.approx(resolved.sum() / haemoglobin.resolved.sum())
    scores = score(replace(haemoglobin, resolved=resolved), haemoglobin)
    assert (scores.atoms, scores.lddt) == (1, 1)


def test_one_chain_has_no_interface():
    structure = make_structure([make_chain("A", ["GLY", "ALA", "SER", "GLY", "LEU"])])
    scores = score(structure, structure)
    assert (scores.interface_lddt, scores.dockq, scores.ligand_rmsd) == (None, None, None)
    assert scores.lddt == 1


def test_chains_without_a_backbone_have_contacts_but_no_interface():
    """Only C1' is resolved of DNA made so."""
    chains = [make_chain(name, ["DA"] * 5, origin=(0, y, 0), mol_type=DNA) for name, y in (("A", 0.0), ("B", 4.0))]
    structure = make_structure(chains)
    scores = score(structure, structure)
    assert (scores.interfaces, scores.dockq, scores.interface_lddt) == ([], None, 1)


def test_another_sequence_is_refused():
    first, second = (make_structure([make_chain("A", sequence)]) for sequence in (["GLY"] * 4, ["ALA"] * 4))
    with pytest.raises(DataError, match="protein, DNA or RNA"):
        score(first, second)


def test_superposition_is_the_motion():
    points = np.random.default_rng(2).normal(size=(9, 3))
    moved = points @ ROTATION.T - 4
    assert np.allclose(superposition(moved, points).apply(moved), points, atol=1e-5)
    mirrored = -points
    assert not np.allclose(superposition(mirrored, points).apply(mirrored), points, atol=0.1)


def test_tm_score_finds_the_part_that_is_right():
    """A quarter of the chain is right, the rest is far away and turned inside out."""
    truth = np.cumsum(np.random.default_rng(4).normal(size=(200, 3)) * 2.2, axis=0)
    predicted = np.concatenate([-truth[:150] * (1, 2, 3) + 50, truth[150:] @ ROTATION])
    assert tm_score(predicted, truth) > 0.25


@pytest.mark.parametrize("change", ["noise", "hinge"])
def test_tm_score_is_that_of_the_original_program(haemoglobin, change):
    """TM-align finds its own correspondence, which for such changes is nearly the known one, by a coarser search."""
    own = haemoglobin.asym_id == 0
    truth = haemoglobin.center[0][own][haemoglobin.center[1][own]].astype(np.float64)
    if change == "noise":
        predicted = truth + np.random.default_rng(3).normal(scale=1.2, size=truth.shape)
    else:
        predicted = np.concatenate([truth[:80], (truth[80:] - truth[80]) @ ROTATION + truth[80]])
    letters = "A" * len(truth)
    result = tmtools.tm_align(predicted, truth, letters, letters)
    assert -0.002 < tm_score(predicted, truth) - result.tm_norm_chain2 < 0.015
