"""Templates: laid on a query by sequence, packed, prepared from a table, read by the loader, and as features."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from cpfold_train.__main__ import main
from cpfold_train.data.features.atoms import rotation_matrices
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.features.templates import (
    Template,
    draw_templates,
    pack_templates,
    template_features,
    unpack_templates,
)
from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.sampling import Source
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.stream.validate import check_sample
from cpfold_train.data.structures.structure import pack_arrays, unpack_arrays
from cpfold_train.errors import DataError
from cpfold_train.parallel.grid import Grid
from tests.structures import write_mmcif


@pytest.fixture(scope="module")
def query():
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == "4hhb")
    return read_sample(entry)[0]


def turned(structure):
    """The structure in another orientation."""
    rotation = rotation_matrices(np.array([[1.0, 2, 3, 4]]))[0]
    coords = structure.coords @ rotation.T + 5
    return replace(structure, coords=np.where(structure.resolved[:, None], coords, 0).astype(np.float32)), rotation


def test_alignment_carries_over_what_the_template_has(query):
    """Chain A on chain C: same sequence, other coordinates; a stretch that the template lacks is left out."""
    kept = np.setdiff1d(np.arange(len(query)), np.arange(300, 320))
    start = np.concatenate([[0], np.cumsum(np.diff(query.atom_start)[kept])]).astype(np.int32)
    own = np.isin(query.atom_token, kept)
    tokens = ("res_type", "component", "res_index", "asym_id", "modified", "center_atom", "disto_atom")
    shorter = replace(
        query,
        atom_start=start,
        **{name: getattr(query, name)[kept] for name in tokens},
        **{name: getattr(query, name)[own] for name in ("ref_atom", "resolved", "coords", "b_factor")},
    )
    template = make_template(shorter, query, [(0, 2)])
    shown = np.setdiff1d(np.arange(141), np.arange(13, 33))
    np.testing.assert_array_equal(template.token, shown)
    np.testing.assert_array_equal(template.res_type, query.res_type[:141][shown])
    np.testing.assert_array_equal(template.center, query.center[0][287 + shown])
    np.testing.assert_array_equal(template.disto_center, query.disto_center[0][287 + shown])
    np.testing.assert_array_equal(template.backbone[:, 1], template.center)
    assert template.frame_known.all() and template.disto_known.all()


def test_related_sequences_are_aligned(query):
    """The alpha and beta chains of haemoglobin: their two histidines at the iron are aligned with each other."""
    template = make_template(query, query, [(1, 0)])
    shown = dict(zip((template.token - 141).tolist(), template.center.tolist()))
    for in_beta, in_alpha in ((62, 57), (91, 86)):
        assert shown[in_beta] == query.center[0][in_alpha].tolist()
    assert len(shown) >= 138


def test_round_trip(query):
    templates = [make_template(query, query, chains) for chains in ([(0, 2)], [(1, 3), (0, 0)])]
    again = unpack_templates(unpack_arrays(pack_arrays(pack_templates(templates))))
    assert len(again) == 2 and unpack_templates({}) == []
    for one, other in zip(templates, again):
        for field in fields(Template):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_features(query):
    """Positions seen from a residue's frame do not depend on how the template lies."""
    tokens = np.concatenate([np.arange(100, 200), np.arange(430, 440), np.arange(600, 605)])
    moved, rotation = turned(query)
    pair = [make_template(structure, query, [(0, 0), (1, 1)]) for structure in (query, moved)]
    features = template_features(pair, query, tokens, 3)
    covered = np.arange(len(tokens)) < 100
    for name in ("mask", "mask_frame", "mask_cb"):
        np.testing.assert_array_equal(features[f"template_{name}"], [covered, covered, 0 * covered])
    np.testing.assert_array_equal(features["template_restype"][0, :100], query.res_type[tokens[:100]])
    turns = features["template_frame_rot"]
    np.testing.assert_allclose(
        turns[:2, :100].transpose(0, 1, 3, 2) @ turns[:2, :100], np.broadcast_to(np.eye(3), (2, 100, 3, 3)), atol=1e-5
    )
    np.testing.assert_allclose(rotation @ turns[0, :100], turns[1, :100], atol=1e-4)
    seen = [
        np.einsum(
            "ixa,ijx->ija",
            turns[k, :100],
            features["template_ca"][k, :100] - features["template_frame_t"][k, :100, None],
        )
        for k in range(2)
    ]
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-3)
    towards_c = query.coords[query.atom_start[tokens[:100]] + 2] - query.coords[query.atom_start[tokens[:100]] + 1]
    along = (turns[0, :100, :, 0] * towards_c).sum(-1)
    np.testing.assert_allclose(along, np.linalg.norm(towards_c, axis=1), rtol=1e-4)
    own = tokens[:100]
    alpha = query.coords[query.atom_start[own] + 1]
    np.testing.assert_allclose(features["template_frame_t"][0, :100], alpha, atol=1e-3)
    np.testing.assert_allclose(features["template_ca"][0, :100], query.center[0][own], atol=1e-3)
    np.testing.assert_allclose(features["template_cb"][0, :100], query.disto_center[0][own], atol=1e-3)
    assert all(
        (features[name][2] == 0).all() and (features[name][:, 100:] == 0).all() for name in features if name[0] == "t"
    )
    visible = features["visibility_ids"]
    assert (visible[0, :100] == 0).all() and (visible[1, :100] == 1).all() and not visible[2].any()
    chains = query.asym_id[tokens[100:]]
    np.testing.assert_array_equal(visible[0, 100:], -1 - chains)


def test_how_many_templates_are_drawn():
    templates = list(range(6))
    counts = [len(draw_templates(templates, 4, np.random.default_rng(seed))) for seed in range(700)]
    share = np.bincount(counts, minlength=5) / 700
    np.testing.assert_allclose(share, np.array([1, 1, 1, 1, 3]) / 7, atol=0.05)
    drawn = draw_templates(templates, 4, np.random.default_rng(3))
    assert len(set(drawn)) == len(drawn)
    assert draw_templates([], 4, np.random.default_rng(0)) == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An entry of two chains, one of which has templates: a table with good lines and all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("templates")
    sequence = ["MET", "GLY", "SER", "ALA", "TRP", "LYS", "LEU", "VAL"] * 3
    for name, length, chains in (("query", 24, "AB"), ("like", 20, "A"), ("pair", 24, "AB")):
        residues = list(enumerate(sequence[:length], 1))
        (folder / name).mkdir()
        write_mmcif(
            folder / name / f"{name}.cif",
            [(chain, 1, residues) for chain in chains],
            {1: sequence[:length]},
            {1: "polypeptide(L)"},
        )
    (folder / "broken.cif").write_text("nothing")
    rows = [
        ("entry", "chain", "path", "template chain"),
        ("QUERY", "xA", "like/like.cif", "xA"),
        ("query", "xA", "pair/pair.cif", "xA"),
        ("query", "B", "pair/pair.cif", "xB"),
        ("query", "xA", "broken.cif", "A"),
        ("query", "xZ", "like/like.cif", "xA"),
        ("query", "xB", "like/like.cif", "xQ"),
        ("query", "A", "like/like.cif", "A"),
        ("absent", "A", "like/like.cif", "xA"),
    ]
    (folder / "templates.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    table = str(folder / "templates.tsv")
    assert main(["prepare", str(folder / "query"), str(folder / "out"), "--templates", table, "--workers", "1"]) == 0
    return folder / "out"


def test_prepare_lays_templates(prepared):
    (entry,) = open_shards([str(prepared / "*.tar")])
    structure, _, templates = read_sample(entry)
    assert [template.token.tolist() for template in templates] == [list(range(20)), list(range(48))]
    np.testing.assert_array_equal(templates[1].center, structure.center[0])
    report = json.loads((prepared / "report.json").read_text())
    (described,) = report["entries"]
    assert described["templates"] == 2 and report["unused_files"] == ["like.cif"]
    problems = " ".join(described["problems"])
    for problem in ("broken.cif", "no protein chain xZ", "no protein chain xQ", "chain A is there twice"):
        assert problem in problems


def test_loader_shows_templates(prepared):
    settings = {"crop_size": 100, "samples_per_epoch": 1, "shuffle": False}
    (batch,) = TileLoader([Source([str(prepared / "*.tar")])], Grid(), **settings)
    assert batch["template_mask"].sum(-1).tolist() == [[20, 48]]
    assert batch["visibility_ids"][0, 1].tolist() == [1] * 48
    (batch,) = TileLoader([Source([str(prepared / "*.tar")])], Grid(), max_templates=1, **settings)
    assert batch["template_mask"].sum(-1).tolist() == [[20]]


@pytest.mark.parametrize(
    ("field", "spoil", "reason"),
    [
        ("token", lambda values: values[::-1], "not in order"),
        ("token", lambda values: values + 100_000, "out of range"),
        ("token", lambda values: values.astype(np.int64), "int64 instead of int32"),
        ("center", lambda values: values * np.float32(np.nan), "holds NaN"),
        ("backbone", lambda values: values[:-1], "has shape"),
        ("res_type", lambda values: values + np.int8(40), "residue token of template 0 is out of range"),
    ],
)
def test_damaged_templates_are_refused(query, field, spoil, reason):
    template = make_template(query, query, [(0, 2)])
    check_sample(query, {}, [template], "4hhb")
    with pytest.raises(DataError, match=reason):
        check_sample(query, {}, [replace(template, **{field: spoil(getattr(template, field))})], "4hhb")
    empty = Template(*(getattr(template, f.name)[:0] for f in fields(Template)))
    with pytest.raises(DataError, match="template 0"):
        check_sample(query, {}, [empty], "4hhb")
