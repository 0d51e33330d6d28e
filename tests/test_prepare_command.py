"""prepare: structure files and alignments to shards, checked against biotite's own reading and by hand."""

import importlib.resources
import json

import biotite.structure as struc
import biotite.structure.io.pdbx as pdbx
import numpy as np
import pytest
import webdataset as wds

from cpfold_train.__main__ import main
from cpfold_train.data.a3m import merge, read_alignment, species_key
from cpfold_train.data.alignment import UNPAIRED, Alignment
from cpfold_train.data.parse import read_structure
from cpfold_train.data.residues import GAP, PROTEIN, TOKEN_IDS, TOKENS, letter_table
from cpfold_train.data.shards import open_shards, read_sample
from cpfold_train.errors import DataError

ATOMS = {"GLY": ["N", "CA", "C", "O"], "DA": ["P", "C1'", "C2", "C4"], "DC": ["P", "C1'", "C2", "C4"], "HOH": ["O"]}
PROTEIN_ATOMS = ["N", "CA", "C", "O", "CB"]


def write_mmcif(path, chains, sequences, types, extra=()):
    """A tiny mmCIF. ``chains``: (name, entity, [(number, residue)]); ``extra``: whole atom rows to add."""
    rows, x = [], 0.0
    for name, entity, residues in chains:
        for number, residue in residues:
            for atom in ATOMS.get(residue, PROTEIN_ATOMS):
                if residue == "MSE" and atom == "CB":
                    rows.append(("HETATM", "SE", "SE", ".", residue, name, entity, number, x, 1.0))
                rows.append(("ATOM", atom[0], atom, ".", residue, name, entity, number, x, 1.0))
                x += 1.0
    rows += extra
    lines = ["data_TINY", "_exptl.method 'ELECTRON MICROSCOPY'", "_em_3d_reconstruction.resolution 3.25", "loop_"]
    lines += ["_entity_poly.entity_id", "_entity_poly.type", *(f"{e} '{kind}'" for e, kind in types.items())]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    lines += [f"{e} {i + 1} {name}" for e, names in sequences.items() for i, name in enumerate(names)]
    columns = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id"
    )
    columns += " Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_comp_id auth_asym_id auth_atom_id"
    lines += [
        "loop_",
        *(f"_atom_site.{column}" for column in [*columns.split(), "pdbx_PDB_ins_code", "pdbx_PDB_model_num"]),
    ]
    for i, (group, element, atom, alt, residue, name, entity, number, x, occupancy) in enumerate(rows):
        place = f"{x:.3f} 0.5 -1.25 {occupancy} 20.5"
        seq, quoted = ("." if residue == "HOH" else number), f'"{atom}"'
        lines.append(
            f"{group} {i + 1} {element} {quoted} {alt} {residue} {name} {entity} {seq} {place} {number} {residue} "
            f"x{name} {quoted} ? 1"
        )
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def tiny(tmp_path):
    """Two copies of a peptide (one listed backwards) with a gap and a modified residue, DNA, and a water."""
    peptide = ["ACE", "MSE", "GLY", "SEP", "ALA", "XXX"]
    path = tmp_path / "tiny.cif"
    seen = [(2, "MSE"), (3, "GLY"), (4, "SEP"), (5, "ALA")]
    alternatives = [
        ("ATOM", "C", "CA", alt, "ALA", "B", 1, 5, x, occupancy)
        for alt, x, occupancy in (("A", 70, 0.3), ("B", 80, 0.7))
    ]
    write_mmcif(
        path,
        [("A", 1, seen[::-1]), ("B", 1, seen[:3]), ("C", 2, [(1, "DA"), (2, "DC")]), ("D", 3, [(1, "HOH")])],
        {1: peptide, 2: ["DA", "DC"]},
        {1: "polypeptide(L)", 2: "polydeoxyribonucleotide"},
        alternatives,
    )
    return path


def test_tiny_structure(tiny):
    structure, left_out = read_structure(tiny)
    names = [TOKENS[token] for token in structure.res_type]
    assert names == ["UNK", "MET", "GLY", "SER", "ALA", "UNK"] * 2 + ["DA", "DC"]
    assert structure.modified.tolist() == [True, False, False, True, False, True] * 2 + [False] * 2
    assert structure.resolved.tolist() == [False, True, True, True, True, False] * 2 + [True, True]
    assert structure.res_index.tolist() == [*range(6), *range(6), 0, 1]
    chains = structure.meta["chains"]
    assert [(c["name"], c["auth_name"], c["entity"], c["sym"], c["type"]) for c in chains] == [
        ("A", "xA", 0, 0, "protein"),
        ("B", "xB", 0, 1, "protein"),
        ("C", "xC", 1, 0, "dna"),
    ]
    assert left_out["water"] == 1
    assert (structure.meta["method"], structure.meta["resolution"]) == ("ELECTRON MICROSCOPY", 3.25)
    # the other alternative of B's alanine, and the sulphur that selenium stands for
    assert structure.center[10].tolist() == [80.0, 0.5, -1.25]
    assert b"SD" in structure.atom_name[structure.atom_start[1] : structure.atom_start[2]]


def test_representative_atoms(tiny):
    structure, _ = read_structure(tiny)
    center, known = structure.disto_center()
    atoms = structure.atom_start[:-1] + structure.disto_atom
    names = [structure.atom_name[atom].decode() if ok else None for atom, ok in zip(atoms, known)]
    assert names[:6] == [None, "CB", "CA", "CB", "CB", None]
    assert names[6:] == [None, "CB", "CA", "CB", None, None, "C4", "C2"]
    assert (center[~known] == 0).all()


def test_real_entry_against_biotite():
    with importlib.resources.as_file(importlib.resources.files("tmtools") / "data" / "2gtl.cif") as path:
        structure, _ = read_structure(path)
        block = pdbx.CIFFile.read(path).block
    atoms = pdbx.get_structure(block, model=1, use_author_fields=False, extra_fields=["b_factor"])
    atoms = atoms[struc.filter_amino_acids(atoms) & (atoms.res_id > 0)]
    assert len(structure) == 2419
    assert structure.meta["counts"] == {
        "atoms": 18970,
        "chains": 15,
        "entities": 7,
        "resolved": 2395,
        "tokens": 2419,
    } | {"atoms": atoms.array_length()}
    alphas = atoms[atoms.atom_name == "CA"]
    np.testing.assert_array_equal(structure.center[structure.resolved], alphas.coord)
    assert structure.res_name[structure.resolved].astype(str).tolist() == alphas.res_name.tolist()
    assert (structure.res_index[structure.resolved] + 1).tolist() == alphas.res_id.tolist()
    np.testing.assert_array_equal(structure.coords, atoms.coord)
    np.testing.assert_array_equal(structure.b_factor, atoms.b_factor.astype(np.float32))
    letters = dict(
        zip(
            block["entity_poly"]["entity_id"].as_array(str),
            block["entity_poly"]["pdbx_seq_one_letter_code_can"].as_array(str),
        )
    )
    entity_of = dict(zip(block["struct_asym"]["id"].as_array(str), block["struct_asym"]["entity_id"].as_array(str)))
    table = letter_table(PROTEIN)
    for asym_id, chain in enumerate(structure.meta["chains"]):
        sequence = letters[entity_of[chain["name"]]].replace("\n", "")
        assert structure.res_type[structure.asym_id == asym_id].tolist() == [table[ord(c)] for c in sequence]


def test_formats_agree(tiny, tmp_path):
    """The same molecule as BinaryCIF, and as PDB with the sequence in SEQRES or left to the observed residues."""
    expected, _ = read_structure(tiny)
    block = pdbx.CIFFile.read(tiny).block

    def column(text):
        return pdbx.BinaryCIFColumn(text.as_array(str), None if text.mask is None else text.mask.array)

    columns = {name: pdbx.BinaryCIFCategory({k: column(v) for k, v in block[name].items()}) for name in block}
    binary = pdbx.BinaryCIFFile({"TINY": pdbx.BinaryCIFBlock(columns)})
    binary.write(tmp_path / "tiny.bcif")
    read, _ = read_structure(tmp_path / "tiny.bcif")
    np.testing.assert_array_equal(read.coords, expected.coords)
    assert read.res_name.tolist() == expected.res_name.tolist()

    lines, serial = [], 0
    for number, residue in [(7, "GLY"), (8, "ALA"), (11, "SER")]:
        for atom in ATOMS.get(residue, PROTEIN_ATOMS):
            serial += 1
            lines.append(
                f"ATOM  {serial:5d}  {atom:<3s} {residue} A{number:4d}    {serial:8.3f}{0.5:8.3f}{-1.25:8.3f}"
                f"  1.00 20.50          {atom[0]:>2s}"
            )
    (tmp_path / "bare.pdb").write_text("\n".join([*lines, "END", ""]))
    bare, _ = read_structure(tmp_path / "bare.pdb")
    assert bare.res_name.tolist() == [b"GLY", b"ALA", b"SER"]
    seqres = "SEQRES   1 A    6  MET GLY ALA GLY LEU SER"
    (tmp_path / "full.pdb").write_text("\n".join([seqres, *lines, "END", ""]))
    full, _ = read_structure(tmp_path / "full.pdb")
    assert full.res_name.tolist() == [b"MET", b"GLY", b"ALA", b"GLY", b"LEU", b"SER"]
    assert full.resolved.tolist() == [False, True, True, False, False, True]
    np.testing.assert_array_equal(full.coords, bare.coords)


def write_a3m(path, *rows):
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in rows))
    return path


def tokens_of(letters):
    return letter_table(PROTEIN)[np.frombuffer(letters.encode(), np.uint8)]


def test_a3m_insertions(tmp_path):
    """Inserted residues are counted at the column that follows; those after the last column have none."""
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", "ACDE"), ("a", "AghC-pE"), ("b", "gg-CDElll"), ("c", "A.CDE"))
    alignment = read_alignment(path, PROTEIN, "ACDE", tokens_of("ACDE"))
    np.testing.assert_array_equal(alignment.tokens[1:], [tokens_of("AC-E"), tokens_of("-CDE"), tokens_of("ACDE")])
    assert alignment.deletions.tolist() == [[0, 0, 0, 0], [0, 2, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_a3m_on_a_longer_entity(tmp_path):
    """Residues that the file's query lacks are gaps; its columns that the entity lacks become insertions."""
    entity = "MMWACDEFGHIKLNPQRSTV"
    own = "ACDEFGHIKLNWPQRSTV"
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", own), ("a", own), ("b", own[:11] + "-" + own[12:]))
    alignment = read_alignment(path, PROTEIN, entity, tokens_of(entity))
    assert alignment.tokens[0].tolist() == tokens_of(entity).tolist()
    assert alignment.tokens[1].tolist() == [GAP] * 3 + tokens_of(entity[3:]).tolist()
    assert alignment.deletions[1].tolist() == [0] * 14 + [1] + [0] * 5
    assert alignment.deletions[2].sum() == 0


def test_a3m_of_another_sequence(tmp_path):
    path = write_a3m(tmp_path / "t_A_x.a3m", ("query", "WWWWPPPPWWWW"))
    with pytest.raises(DataError, match=r"t_A_x.a3m does not belong to the sequence"):
        read_alignment(path, PROTEIN, "ACDEFGHIKLMN", tokens_of("ACDEFGHIKLMN"))
    path = write_a3m(tmp_path / "t_A_y.a3m", ("query", "ACDE"), ("a", "ACD"))
    with pytest.raises(DataError, match="row 2 has 3 columns and the query 4"):
        read_alignment(path, PROTEIN, "ACDE", tokens_of("ACDE"))


def test_a3m_keys(tmp_path):
    assert species_key("tr|A0A0L8REU8|A0A0L8REU8_SACEU OS=Saccharomyces") == species_key("sp|P1|XX_SACEU")
    assert species_key("UniRef100_UPI000462DD9F_110321/\t205") == species_key("x OX=110321") != UNPAIRED
    assert species_key("UniRef90_U6DFL6/204-373") == UNPAIRED
    files = [write_a3m(tmp_path / f"t_{c}_paired.a3m", ("q", "ACDE"), ("x", "AC--"), ("y", "--DE")) for c in "AB"]
    first, second = (read_alignment(path, PROTEIN, "ACDE", tokens_of("ACDE")) for path in files)
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


@pytest.fixture
def folder(tmp_path, tiny):
    """A folder with a good file, one that is cut off and one without polymers, and alignments."""
    entries, alignments = tmp_path / "entries", tmp_path / "msas"
    entries.mkdir()
    alignments.mkdir()
    tiny.rename(entries / "tiny.cif")
    (entries / "again.cif").write_bytes((entries / "tiny.cif").read_bytes())
    (entries / "broken.cif").write_text("data_X\nloop_\n_atom_site.id\n_atom_site.x\n1\n")
    write_mmcif(entries / "wet.cif", [("D", 3, [(1, "HOH")])], {1: ["GLY"]}, {1: "polypeptide(L)"})
    write_a3m(alignments / "tiny_xA_good.a3m", ("query", "XMGSAX"), ("a", "-MGSA-"))
    write_a3m(alignments / "tiny_xA_bad.a3m", ("query", "WWWWWWW"))
    write_a3m(alignments / "tiny_xZ_none.a3m", ("query", "MGSA"))
    write_a3m(alignments / "other_A_x.a3m", ("query", "MGSA"))
    return entries, alignments


def prepare(folder, out, *options):
    entries, alignments = folder
    return main(["prepare", str(entries), str(out), "--msa", str(alignments), "--min-residues", "4", *options])


def test_prepare_reports_and_goes_on(folder, tmp_path, capsys):
    assert prepare(folder, tmp_path / "out", "--workers", "1", "--val", "again") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    by_key = {entry["key"]: entry for entry in report["entries"]}
    assert (report["kept"], report["dropped"]) == (2, 2)
    assert by_key["broken"]["dropped"].startswith("broken.cif")
    assert by_key["wet"]["dropped"] == "wet.cif holds no protein or nucleic acid chain"
    problems = " ".join(by_key["tiny"]["problems"])
    assert "tiny_xA_bad.a3m does not belong" in problems
    assert "tiny_xZ_none.a3m: the entry has no such chain" in problems
    assert report["unused_alignments"] == ["other_A_x.a3m"]
    assert report["shards"] == ["train-000000.tar", "val-000000.tar"]
    assert "2 of 4 entries kept" in capsys.readouterr().out


def test_prepare_is_deterministic_and_readable(folder, tmp_path):
    prepare(folder, tmp_path / "one", "--workers", "1", "--shard-size", "0.000001")
    prepare(folder, tmp_path / "two", "--workers", "2", "--shard-size", "0.000001")
    tars = sorted((tmp_path / "one").glob("*"))
    assert [tar.name for tar in tars if tar.suffix == ".tar"] == ["train-000000.tar", "train-000001.tar"]
    for path in tars:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    samples = list(wds.WebDataset(str(tmp_path / "one" / "train-000001.tar"), shardshuffle=False))
    assert {"__key__", "json", "structure.npz", "msa.npz"} <= set(samples[0])
    entry = open_shards([str(tmp_path / "one" / "*.tar")])[1]
    assert entry.key == samples[0]["__key__"] == "tiny"
    structure, alignments = read_sample(entry)
    assert len(structure) == 14 and list(alignments) == [0]
    expected = [GAP, TOKEN_IDS["MET"], TOKEN_IDS["GLY"], TOKEN_IDS["SER"], TOKEN_IDS["ALA"], GAP]
    assert alignments[0].tokens[1].tolist() == expected
    (tmp_path / "one" / "train-000001.index.json").unlink()
    assert open_shards([str(tmp_path / "one" / "*.tar")])[1] == entry


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere", "out"], "nowhere does not exist: type the path of a folder or file with structures"),
        (["{entries}", "out", "--val", "9xyz"], "no structure file for 9xyz"),
        (["{entries}", "out", "--msa", "nowhere"], "--msa nowhere is not a folder"),
        (["{entries}", "out", "--workers", "0"], "start at 1"),
    ],
)
def test_prepare_says_what_to_type(folder, options, sentence, capsys):
    assert main(["prepare", *(option.format(entries=folder[0]) for option in options)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
