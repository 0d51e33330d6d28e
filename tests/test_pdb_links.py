"""Links of PDB files: the same entry as PDB and as mmCIF gives the same structure."""

from __future__ import annotations

from pathlib import Path

import gemmi
import numpy as np
import pytest

from cpfold_train.data.structures.parse import read_structure
from cpfold_train.data.structures.structure import ARRAYS
from cpfold_train.vocabulary import BOND_TYPES

DATA = Path(__file__).parent / "data"
ENTRIES = [p / "shared/structures/entries" for p in Path(__file__).parents]
ENTRIES = next((folder for folder in ENTRIES if folder.is_dir()), None)
COVALENT = BOND_TYPES.index("covalent")
NOT_IN_PDB = {
    "6rw4.cif.gz": "128,280 atoms: a PDB file numbers 99,999",
    "7a4d-assembly1.cif.gz": "lists its sequences by chain only, of which gemmi writes no SEQRES",
}
"""Entries that cannot be compared."""


def assert_same(first, second):
    """All arrays and chains but their names; PDB files have three digits of a coordinate and two of a B factor."""
    for name in ARRAYS:
        one, other = getattr(first, name), getattr(second, name)
        if name in ("coords", "b_factor"):
            np.testing.assert_allclose(one, other, rtol=0, atol={"coords": 1.1e-3, "b_factor": 1.1e-2}[name])
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)
    one, other = ([{**chain, "name": "", "auth_name": ""} for chain in s.meta["chains"]] for s in (first, second))
    assert one == other


def test_a_glycan_as_pdb_and_as_mmcif():
    """A glycosylated asparagine with the three sugars that are linked to it, of 6LXK."""
    (pdb, _), (cif, _) = (read_structure(DATA / f"glycan.{suffix}") for suffix in ("pdb", "cif"))
    assert_same(pdb, cif)
    assert (pdb.bond_type == COVALENT).sum() == 3
    assert len(pdb) == 5 + 14 + 14 + 11
    assert len(pdb.meta["chains"]) == 2


def glycan_with(tmp_path, change):
    lines = [change(line) for line in (DATA / "glycan.pdb").read_text().splitlines()]
    (tmp_path / "changed.pdb").write_text("\n".join(line for line in lines if line is not None) + "\n")
    return read_structure(tmp_path / "changed.pdb")[0]


def test_links_of_other_programs(tmp_path):
    """Refmac's records, records without symmetry operators, repeated ones, and those that are no bonds."""
    expected = glycan_with(tmp_path, lambda line: line)
    assert (expected.bond_type == COVALENT).sum() == 3
    link, changes = "LINK", {}
    changes["Refmac"] = lambda line: line.replace("LINK ", "LINKR") if line.startswith(link) else line
    changes["short"] = lambda line: line[:57] if line.startswith(link) else line
    changes["twice"] = lambda line: f"{line}\n{line}" if line.startswith(link) else line
    for change in changes.values():
        assert_same(glycan_with(tmp_path, change), expected)
    changes = {"other copy": lambda line: f"{line[:66]}  2655{line[72:]}" if line.startswith(link) else line}
    changes["no number"] = lambda line: f"{line[:52]}  *1{line[56:]}" if line.startswith(link) else line
    changes["no such residue"] = lambda line: f"{line[:52]} 999{line[56:]}" if line.startswith(link) else line
    changes["a metal"] = lambda line: line[:76] + "CA" if line.startswith("HETATM") and " C1 " in line else line
    for name, change in changes.items():
        found = glycan_with(tmp_path, change)
        assert not (found.bond_type == COVALENT).any(), name
        assert len(found.meta["chains"]) == 4, name


def test_links_of_an_assembly(tmp_path):
    """Each copy has its own."""
    remark = ["REMARK 350", "REMARK 350 BIOMOLECULE: 1", "REMARK 350 APPLY THE FOLLOWING TO CHAINS: A, G"]
    for number, shift in ((1, 0.0), (2, 200.0)):
        for row in range(3):
            turn = "".join(f"{float(row == column):10.6f}" for column in range(3))
            remark.append(f"REMARK 350   BIOMT{row + 1}{number:4d}{turn}{shift:15.5f}")
    text = (DATA / "glycan.pdb").read_text()
    (tmp_path / "two.pdb").write_text("\n".join([*remark, text]))
    found, _ = read_structure(tmp_path / "two.pdb", assembly="1")
    assert (found.bond_type == COVALENT).sum() == 6
    ends = found.bond_atoms[found.bond_type == COVALENT]
    copy = np.array([c["name"].split(":")[0].endswith("-2") for c in found.meta["chains"]])
    copy = copy[found.asym_id[found.atom_token]]
    assert (copy[ends[:, 0]] == copy[ends[:, 1]]).all()
    assert len(found.meta["chains"]) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(ENTRIES is None, reason="shared/structures is not beside the checkout")
def test_entries_as_pdb_and_as_mmcif(tmp_path):
    """All mmCIF entries that gemmi can write as PDB, with the names of chains as its one letter allows."""
    compared, left_out, bonds = [], set(), 0
    for path in sorted(ENTRIES.glob("*.cif.gz")):
        written = gemmi.read_structure(str(path))
        written.shorten_chain_names()
        has_sequence = any(entity.full_sequence for entity in written.entities)
        one_letter = max(len(chain.name) for chain in written[0]) == 1
        if not has_sequence or not one_letter or written[0].count_atom_sites() > 99_999:
            left_out.add(path.name)
            continue
        written.write_pdb(str(tmp_path / "entry.pdb"))
        (pdb, _), (cif, _) = read_structure(tmp_path / "entry.pdb"), read_structure(path)
        assert_same(pdb, cif)
        compared.append(path.name)
        bonds += int((pdb.bond_type == COVALENT).sum())
    assert left_out == set(NOT_IN_PDB)
    assert len(compared) == 37
    assert bonds > 30
