"""Which chains and entries are left out."""

import pytest

from cpfold_train.data.prepare.filters import Limits, fit_chains, unfit_entry
from cpfold_train.vocabulary import NONPOLYMER
from tests.structures import make_chain, make_structure

PEPTIDE = ["ALA", "GLY", "SER", "LEU", "VAL", "LYS"]
NO_LIMITS = Limits()
GOOD = make_chain("A", PEPTIDE)


def kept(*chains, limits=NO_LIMITS, **meta):
    structure, removed = fit_chains(make_structure([GOOD, *chains], **meta), limits)
    return [chain["name"] for chain in structure.meta["chains"]], dict(removed)


def ligand(name, *residues):
    return make_chain(name, residues, mol_type=NONPOLYMER, origin=(0, 40, 0))


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (make_chain("B", ["UNK"] * 6, origin=(0, 20, 0)), "only unknown residues"),
        (make_chain("B", PEPTIDE, origin=(0, 20, 0), missing=[0, 1, 2]), "fewer than 4 resolved residues"),
        (make_chain("B", PEPTIDE, origin=(0, 20, 0), missing=[0, 1]), None),
        (make_chain("B", PEPTIDE, origin=(0, 20, 0), step=10.1), "neighbouring C-alphas more than 10 Å apart"),
        (make_chain("B", PEPTIDE * 2, origin=(0, 20, 0), step=6, missing=[3]), None),
        (make_chain("B", PEPTIDE, origin=(0.5, 0.5, 0)), "clashes with another chain"),
        (make_chain("B", ["HEM"], mol_type=NONPOLYMER, missing=[0]), "ligand without coordinates"),
        (ligand("B", "HEM"), None),
    ],
)
def test_chains(chain, reason):
    assert kept(chain) == ((["A", "B"], {}) if reason is None else (["A"], {reason: 1}))


def test_ligands():
    """Crystallisation aids go only from crystals, and only where they are nothing else; others on request."""
    aids = [ligand("B", "GOL"), make_chain("C", ["SO4"], mol_type=NONPOLYMER, origin=(0, 60, 0))]
    assert kept(*aids, method="X-RAY DIFFRACTION") == (["A"], {"crystallisation aid": 2})
    assert kept(*aids, method="ELECTRON MICROSCOPY")[0] == ["A", "B", "C"]
    assert kept(*aids, method="X-RAY DIFFRACTION", limits=Limits(keep_crystal_aids=True))[0] == ["A", "B", "C"]
    assert kept(ligand("B", "NAG", "GOL"), method="X-RAY DIFFRACTION")[0] == ["A", "B"]
    assert kept(ligand("B", "HEM"), limits=Limits(exclude_ligands=("HEM",))) == (["A"], {"excluded ligand": 1})


@pytest.mark.parametrize(
    ("limits", "meta", "reason"),
    [
        ({"before": "2020-01-01"}, {"release_date": "2019-12-31"}, None),
        ({"before": "2020-01-01"}, {"release_date": "2020-01-01"}, "released 2020-01-01, not before 2020-01-01"),
        ({"after": "2020-01-01"}, {"release_date": "2020-01-01"}, "released 2020-01-01, not after 2020-01-01"),
        ({"after": "2020-01-01"}, {"release_date": "2020-01-02"}, None),
        ({"after": "2020-01-01"}, {}, "it has no release date"),
        ({"max_resolution": 3.0}, {"resolution": 3.5}, "resolution 3.5 Å, worse than --max-resolution 3"),
        ({"max_resolution": 3.0}, {"resolution": 3.0}, None),
        ({"max_resolution": 3.0}, {}, None),
        ({"min_residues": 7}, {}, "6 residues are fewer than --min-residues 7"),
        ({"max_residues": 5}, {}, "6 residues are more than --max-residues 5"),
        ({"max_residues": 6, "max_tokens": 49, "min_tokens": 49}, {}, None),
        ({"max_tokens": 48}, {}, "49 tokens are more than --max-tokens 48"),
        ({"min_tokens": 50}, {}, "49 tokens are fewer than --min-tokens 50"),
        ({"max_chains": 0}, {}, "1 chains are more than --max-chains 0"),
        ({"max_unknown": 0.1}, {}, "17% of the residues are unknown, more than --max-unknown 0.1"),
        ({"max_unknown": 0.2}, {}, None),
    ],
)
def test_entries(limits, meta, reason):
    structure = make_structure([make_chain("A", [*PEPTIDE[:5], "UNK"]), ligand("B", "HEM")], **meta)
    assert unfit_entry(structure, Limits(**({"min_residues": 1} | limits))) == reason


def test_an_entry_without_coordinates():
    structure = make_structure([make_chain("A", PEPTIDE, missing=range(6)), ligand("B", "HEM")])
    assert unfit_entry(structure, Limits(min_residues=1)) == "no residue has coordinates"
