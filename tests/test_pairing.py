"""What prepare and inspect say of rows that pair between chains; ids that are never cut."""

from __future__ import annotations

import json
import shutil
import tarfile

import numpy as np
import pytest

from cpfold_train.__main__ import main
from cpfold_train.data.alignments.a3m import read_rows
from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.alignments.pairing import MOST_PAIRS, REMEDY, told_pairing
from cpfold_train.tables import make_console, make_table, print_whole
from tests.structures import write_a3m


def chain(name, entity, auth=None):
    return {"name": name, "auth_name": auth or name, "entity": entity, "type": "protein"}


def alignment(*keys, kinds=None):
    rows = np.zeros((len(keys), 3), np.int8)
    return Alignment(rows, np.zeros((len(keys), 3), np.uint8), np.array(keys), kinds or {})


def test_rows_that_pair():
    kinds = {7: "TaxID=", 8: "OX=", 9: "OX="}
    first, second = alignment(UNPAIRED, 7, 7, 8, 5, kinds=kinds), alignment(UNPAIRED, 7, 9, UNPAIRED, kinds=kinds)
    chains = [chain("A", 0), chain("Bx", 1, "B")]
    assert told_pairing(chains, {0: first, 1: second}) == [
        "2 of 5 rows of chain A pair with 1 of 4 rows of chain Bx (B), by TaxID="
    ]
    assert told_pairing(chains, {0: first}) == []
    assert told_pairing(chains[:1], {0: first}) == []
    copies = told_pairing([chain("A", 0), chain("C", 0)], {0: first})
    assert copies == ["4 of 5 rows of chains A, C pair between these copies, by OX= and TaxID="]


def test_rows_that_cannot_pair():
    chains = [chain("A", 0), chain("B", 1)]
    bare, seven, eight = alignment(UNPAIRED, UNPAIRED), alignment(UNPAIRED, 7), alignment(UNPAIRED, 8)
    no_row = "no row of chain A pairs with one of chain B"
    for second, why in ((bare, "their rows have no keys"), (eight, "they have no key in common")):
        told = told_pairing(chains, {0: bare if second is bare else seven, 1: second})
        assert told == [no_row, f"the alignments of different chains cannot pair, for {why}: {REMEDY}"]


def test_many_alignments():
    chains = [chain(chr(65 + i), i) for i in range(8)]
    told = told_pairing(chains, {i: alignment(UNPAIRED, 7) for i in range(8)})
    assert len(told) == MOST_PAIRS + 1
    assert told[-1] == "and 16 of 16 more pairs"


@pytest.mark.parametrize(
    ("name", "paired"),
    [("x_A_paired.a3m", True), ("x_A_pairing.a3m", True), ("x_A_non_pairing.a3m", False), ("x_A_un-paired.a3m", False)],
)
def test_labels_of_files(tmp_path, name, paired):
    write_a3m(tmp_path / name, ("query", "MGS"), ("a", "MGA"))
    _, keys, kinds = read_rows(tmp_path / name)
    assert (keys[1] != UNPAIRED) == paired
    assert set(kinds.values()) == ({"the number of the row"} if paired else {""})


@pytest.fixture(scope="module")
def two_chains(tmp_path_factory):
    """A file with the backbones of two short proteins."""
    folder = tmp_path_factory.mktemp("two")
    lines = []
    for chain_id, letters in (("A", "MGSAKVLE"), ("B", "WWYHFKDE")):
        for number, letter in enumerate(letters, 1):
            for k, name in enumerate(("N", "CA", "C", "O")):
                x, y = 3.8 * number + 0.9 * k, 30.0 * (chain_id == "B") + 0.8 * (k % 2)
                lines.append(
                    f"ATOM  {len(lines) + 1:5d}  {name:<3s} {NAMES[letter]} {chain_id}{number:4d}    "
                    f"{x:8.3f}{y:8.3f}{0.0:8.3f}  1.00 10.00           {name[0]}"
                )
    (folder / "dimer.pdb").write_text("\n".join([*lines, "END"]) + "\n")
    return folder


NAMES = {"M": "MET", "G": "GLY", "S": "SER", "A": "ALA", "K": "LYS", "V": "VAL", "L": "LEU", "E": "GLU"}
NAMES |= {"W": "TRP", "Y": "TYR", "H": "HIS", "F": "PHE", "D": "ASP"}


def prepared(folder, out, capsys):
    assert main(["prepare", str(folder / "dimer.pdb"), str(out), "--msa", str(folder), "--min-residues", "4",
                 "--workers", "1"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    (entry,) = json.loads((out / "report.json").read_text())["entries"]
    return shown, entry["pairing"]


def test_prepare_and_inspect(two_chains, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(two_chains, folder)
    write_a3m(folder / "dimer_A_x.a3m", ("q", "MGSAKVLE"), ("a TaxID=5", "MGSAKVLD"), ("b", "MGSAKVL-"))
    write_a3m(folder / "dimer_B_x.a3m", ("q", "WWYHFKDE"), ("a TaxID=5", "WWYHFKDD"))
    sentence = "1 of 3 rows of chain A pair with 1 of 2 rows of chain B, by TaxID="
    shown, reported = prepared(folder, tmp_path / "out", capsys)
    assert reported == [sentence]
    assert f"dimer: {sentence}\n" in shown
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert json.load(tar.extractfile("dimer.json"))["pairing"] == [sentence]
    assert main(["inspect", str(tmp_path / "out"), "dimer", "--out", str(tmp_path / "x.png")]) == 0
    assert f"{sentence}\n" in capsys.readouterr().out


def test_an_alignment_of_chains_behind_each_other(two_chains, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(two_chains, folder)
    text = "#8,8\t1,1\n>101\t102\nMGSAKVLEWWYHFKDE\n>x\ty\nMGSAKVLDWWYHFKDD\n"
    (folder / "dimer_AB_colabfold.a3m").write_text(text)
    shown, reported = prepared(folder, tmp_path / "out", capsys)
    assert [sentence.endswith(REMEDY) for sentence in reported] == [False, True, False]
    assert reported[-1].startswith("dimer_AB_colabfold.a3m is ColabFold's")
    assert f"{reported[-1]}\n" in shown


def test_ids_are_whole_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    name = "x" * 60
    table = make_table("id, notes, cluster", text="id, notes", whole="id")
    table.add_row(name, "a long note " * 8, "c" * 30)
    for narrow in (40, None):
        console = make_console()
        console.width = narrow or console.width
        print_whole(console, table)
        shown = capsys.readouterr().out
        assert name in shown
        assert shown.count("c") == 30 + len("cluster"[:1])
