"""Alignment files: their rows, keys and positions in an entity."""

import gzip

import numpy as np
import pytest

from cpfold_train.data.alignments.a3m import chains_of, file_key, merge, read_alignment, species_key
from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.structures.residues import letter_table
from cpfold_train.errors import DataError
from cpfold_train.vocabulary import GAP, PROTEIN, RNA
from tests.structures import write_a3m


def tokens_of(letters):
    return letter_table(PROTEIN)[np.frombuffer(letters.encode(), np.uint8)]


def test_a3m_insertions(tmp_path):
    """Inserted residues are counted at the column that follows; those after the last column have none."""
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", "ACDE"), ("a", "AghC-pE"), ("b", "gg-CDElll"), ("c", "A.CDE"))
    alignment = read_alignment(path, PROTEIN, "ACDE")
    np.testing.assert_array_equal(alignment.tokens[1:], [tokens_of("AC-E"), tokens_of("-CDE"), tokens_of("ACDE")])
    assert alignment.deletions.tolist() == [[0, 0, 0, 0], [0, 2, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_a3m_of_other_programs(tmp_path):
    """A stop at the end, a query in lower case, RNA with the letters of DNA."""
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", "ACDE*"), ("a", "AC-E*"))
    assert read_alignment(path, PROTEIN, "ACDE").tokens.tolist() == [
        tokens_of(row).tolist() for row in ("ACDE", "AC-E")
    ]
    path = write_a3m(tmp_path / "t_A_y.a3m", ("query", "acde"), ("a", "AghC-E"))
    assert read_alignment(path, PROTEIN, "ACDE").deletions.tolist() == [[0, 0, 0, 0], [0, 2, 0, 0]]
    path = write_a3m(tmp_path / "t_A_z.a3m", ("query", "TTTA"), ("a", "TUTA"))
    assert len({*map(bytes, read_alignment(path, RNA, "UUUA").tokens)}) == 1


def test_a3m_on_a_longer_entity(tmp_path):
    """Residues that the file's query lacks are gaps; its columns that the entity lacks become insertions."""
    entity = "MMWACDEFGHIKLNPQRSTV"
    own = "ACDEFGHIKLNWPQRSTV"
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", own), ("a", own), ("b", own[:11] + "-" + own[12:]))
    alignment = read_alignment(path, PROTEIN, entity)
    assert alignment.tokens[0].tolist() == tokens_of(entity).tolist()
    assert alignment.tokens[1].tolist() == [GAP] * 3 + tokens_of(entity[3:]).tolist()
    assert alignment.deletions[1].tolist() == [0] * 14 + [1] + [0] * 5
    assert alignment.deletions[2].sum() == 0


def test_a3m_of_another_sequence(tmp_path):
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", "WWWWPPPPWWWW"))
    with pytest.raises(DataError, match=r"t_A_x\.a3m"):
        read_alignment(path, PROTEIN, "ACDEFGHIKLMN")
    path = write_a3m(tmp_path / "t_A_y.a3m", ("query", "ACDE"), ("a", "ACD"))
    with pytest.raises(DataError, match=r"\b2 .*\b3 .*\b4"):
        read_alignment(path, PROTEIN, "ACDE")


def test_a3m_keys(tmp_path):
    assert species_key("tr|A0A0L8REU8|A0A0L8REU8_SACEU OS=Saccharomyces") == species_key("sp|P1|XX_SACEU")
    assert species_key("UniRef100_UPI000462DD9F_110321/\t205") == species_key("x OX=110321") != UNPAIRED
    assert species_key("UniRef90_U6DFL6/204-373") == UNPAIRED
    files = [write_a3m(tmp_path / f"t_{c}_paired.a3m", ("q", "ACDE"), ("x", "AC--"), ("y", "--DE")) for c in "AB"]
    first, second = (read_alignment(path, PROTEIN, "ACDE") for path in files)
    assert first.keys.tolist() == second.keys.tolist() and len(set(first.keys.tolist())) == 3


def test_merge_drops_repetitions_and_caps():
    def alignment(rows, keys):
        return Alignment(np.array(rows, np.int8)[:, None], np.zeros((len(rows), 1), np.uint8), np.array(keys))

    first = alignment([2, 3, 4, 4, GAP], [-1, -1, -1, -1, -1])
    second = alignment([2, 3, 5, 3], [-1, 7, 7, 8])
    merged = merge([first, second], 100)
    assert merged.tokens[:, 0].tolist() == [2, 3, 5, 3, 4]
    assert merged.keys.tolist() == [-1, 7, 7, 8, -1]
    many = alignment(list(range(2, 22)), [-1] + [1] * 10 + [-1] * 9)
    assert (merge([many], 8).keys != UNPAIRED).sum() == 4
    assert len(merge([many], 8)) == 8
    assert len(merge([many], 1)) == 1


def test_csv(tmp_path):
    """Boltz's form: lower case is inserted, an empty key or -1 means none, equal keys meet in other chains."""
    path = tmp_path / "t_A_x.csv.gz"
    path.write_bytes(gzip.compress(b"key,sequence\n0,ACDE\n7,AghC-E\n-1,ACDE\n,AC--\n7,A--E\n"))
    alignment = read_alignment(path, PROTEIN, "ACDE")
    expected = ["ACDE", "AC-E", "ACDE", "AC--", "A--E"]
    assert alignment.tokens.tolist() == [tokens_of(row).tolist() for row in expected]
    assert alignment.deletions.sum() == alignment.deletions[1, 1] == 2
    assert alignment.keys.tolist() == [UNPAIRED, file_key("7"), UNPAIRED, UNPAIRED, file_key("7")]
    (tmp_path / "t_A_y.csv").write_text("taxon,sequence\n0,ACDE\n")
    with pytest.raises(DataError, match=r"t_A_y\.csv .*key .*sequence"):
        read_alignment(tmp_path / "t_A_y.csv", PROTEIN, "ACDE")


def test_file_names(tmp_path):
    assert chains_of(tmp_path / "4HHB_AC_env.a3m.gz") == ("4hhb", "AC", "env")
    assert chains_of(tmp_path / "pdb_00004hhb_A_x_y.csv") == ("pdb_00004hhb", "A", "x_y")
    assert chains_of(tmp_path / "7a4d-assembly1_AB.a3m") == ("7a4d-assembly1", "AB", "")
    known = {"my", "my_blank"}
    assert chains_of(tmp_path / "My_blank_A_x_y.a3m", known) == ("my_blank", "A", "x_y")
    assert chains_of(tmp_path / "my_B.a3m", known) == ("my", "B", "")
