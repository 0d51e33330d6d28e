"""Taking chains out, interfaces and clashes, against rebuilding and brute force."""

import numpy as np
import pytest

from cpfold_train.data.features import contacts
from cpfold_train.data.features.contacts import clashing_chains, interfaces
from cpfold_train.data.structures.edit import take_chains
from cpfold_train.data.structures.entry import Site
from cpfold_train.data.structures.structure import ARRAYS
from cpfold_train.vocabulary import BOND_TYPES, NONPOLYMER, RNA
from tests.structures import make_chain, make_structure


@pytest.mark.parametrize("keep", [[0, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]])
def test_taking_chains_is_reading_no_others(keep):
    """What is left is what the same chains alone would have become: every array, the counts and the numbering."""
    chains = [
        make_chain("A", ["ALA", "SEP", "GLY"], missing=[2]),
        make_chain("B", ["ALA", "SEP", "GLY"], origin=(0, 9, 0)),
        make_chain("C", ["A", "G"], mol_type=RNA, origin=(0, 18, 0)),
        make_chain("D", ["NAG", "NAG"], mol_type=NONPOLYMER, origin=(0, 27, 0)),
        make_chain("E", ["ALA", "SEP", "GLY"], origin=(0, 36, 0)),
    ]
    links = [(Site("D", 0, "O4"), Site("D", 1, "C1"))]
    taken = take_chains(make_structure(chains, links), np.array(keep, dtype=bool))
    kept = [chain for chain, stays in zip(chains, keep) if stays]
    expected = make_structure(kept, links if keep[3] else [])
    for name in ARRAYS:
        assert getattr(taken, name).dtype == getattr(expected, name).dtype, name
        np.testing.assert_array_equal(getattr(taken, name), getattr(expected, name), err_msg=name)
    assert taken.meta == expected.meta


def test_bonds_to_what_is_taken_out_go():
    chains = [
        make_chain("A", ["ALA", "ASN"]),
        make_chain("B", ["NAG", "NAG"], mol_type=NONPOLYMER),
        make_chain("C", ["ALA", "ASN"]),
    ]
    links = [(Site("B", 0, "O4"), Site("B", 1, "C1")), (Site("C", 1, "CA"), Site("B", 0, "C1"))]
    whole = make_structure(chains, links)
    taken = take_chains(whole, np.array([False, True, False]))
    covalent = BOND_TYPES.index("covalent")
    assert (whole.bond_type == covalent).sum() == 2 and (taken.bond_type == covalent).sum() == 1
    names = taken.comp_atom_name[taken.ref_atom[taken.bond_atoms[taken.bond_type == covalent]]]
    assert names.tolist() == [[b"O4", b"C1"]]


def test_taking_no_chain():
    taken = take_chains(make_structure([make_chain("A", ["ALA", "GLY"])]), np.array([False]))
    assert len(taken) == len(taken.coords) == len(taken.comp_name) == taken.meta["counts"]["tokens"] == 0


def brute_force(structure, distance):
    chain = structure.asym_id[structure.atom_token][structure.resolved]
    coords = structure.coords[structure.resolved].astype(np.float64)
    near = np.linalg.norm(coords[:, None] - coords[None], axis=-1) < distance
    return chain, near & (chain[:, None] != chain[None])


@pytest.mark.parametrize("block", [7, 16384])
def test_interfaces_against_all_pairs(block, monkeypatch):
    monkeypatch.setattr(contacts, "_BLOCK", block)
    rng = np.random.default_rng(3)
    chains = [make_chain(f"{i}", ["ALA"] * 12, origin=rng.uniform(0, 30, 3)) for i in range(14)]
    structure = make_structure([*chains, make_chain("L", ["HEM"], mol_type=NONPOLYMER, origin=(10, 10, 10))])
    chain, near = brute_force(structure, contacts.INTERFACE_DISTANCE)
    pairs = {(int(chain[i]), int(chain[j])) for i, j in zip(*np.nonzero(near)) if chain[i] < chain[j]}
    assert interfaces(structure) == [list(pair) for pair in sorted(pairs)] and len(pairs) > 3


@pytest.mark.parametrize("block", [5, 16384])
def test_clashes(block, monkeypatch):
    """At 10 residues each: B lies on A in 4 of 10, C on D in all of its 5, E on F in 3 of 10, which is not too many."""
    monkeypatch.setattr(contacts, "_BLOCK", block)
    chains = [
        make_chain("A", ["ALA"] * 10),
        make_chain("B", ["ALA"] * 10, origin=(6 * 3.8, 1.0, 0)),
        make_chain("C", ["ALA"] * 5, origin=(0, 50, 0)),
        make_chain("D", ["ALA"] * 10, origin=(0, 51, 0)),
        make_chain("E", ["ALA"] * 10, origin=(0, 100, 0)),
        make_chain("F", ["ALA"] * 10, origin=(7 * 3.8, 101, 0)),
        make_chain("G", ["ALA"] * 10, origin=(0, 200, 0)),
        make_chain("H", ["ALA"] * 10, origin=(0, 201.6, 0)),
        make_chain("I", ["ALA"] * 10, origin=(0, 203.5, 0)),
        make_chain("J", ["ALA"] * 20, origin=(0, 300, 0)),
        make_chain("K", ["ALA"] * 10, origin=(0, 301, 0)),
        make_chain("L", ["ALA"] * 10, origin=(6 * 3.8, 302, 0)),
    ]
    structure = make_structure(chains)
    # Equal fractions and sizes: the later one goes. C has the greater fraction. L clashes only with K, which is gone
    # by then.
    assert [structure.meta["chains"][i]["name"] for i in clashing_chains(structure)] == ["B", "C", "H", "K"]
