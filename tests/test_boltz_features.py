"""Features against those of the stock ``boltz`` package, made from the same arrays.

Where the package is wrong, or draws what here is drawn otherwise, the test says so and checks what must hold instead:

- it sets all deletions of an alignment to zero;
- it leaves the conformer of the last residue, and of residues without a resolved atom, as it is, and centres the others
  on their resolved atoms only;
- it gives a modified residue of a protein no frame, and an unresolved ligand atom whatever frame its sort ends with;
- it leaves unresolved atoms where minus the centre is;
- it shows sequences that are paired once more, unpaired, so rows that are partly paired differ;
- it pairs a single chain with itself: pairing is compared where there are several;
- it computes distances by a matrix product, which rounds some of them into the next bin;
- it lays a template on a crop by the tokens' numbers in the whole sample, so templates are compared on whole ones.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment, pack_alignments
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.stream.batch import make_crop, tile_features
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.structures.structure import ARRAYS
from cpfold_train.parallel.grid import Grid

ORACLE = Path(__file__).parent / "oracle" / "boltz_features.py"
SAME = """
token_index residue_index asym_id entity_id sym_id mol_type method_feature modified token_pad_mask token_resolved_mask
token_disto_mask cyclic_period token_bonds type_bonds contact_conditioning contact_threshold ref_charge ref_element
ref_atom_name_chars ref_space_uid atom_pad_mask atom_resolved_mask bfactor msa msa_mask msa_paired token_to_rep_atom
token_to_center_atom
"""


def pairs_of_copies(structure):
    """Each protein chain with the last copy of itself: the package lays residue i on residue i."""
    chains = [(i, chain["entity"]) for i, chain in enumerate(structure.meta["chains"]) if chain["type"] == "protein"]
    return [(i, max(j for j, other in chains if other == entity)) for i, entity in chains]


def package_features(folder, structure, alignments, tokens, covered):
    """What the package makes of a crop."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    given = {name: getattr(structure, name) for name in ARRAYS} | pack_alignments(alignments) | {"tokens": tokens}
    np.savez(folder / "in.npz", meta=json.dumps(structure.meta), templates=json.dumps(covered), **given)
    subprocess.run([python, str(ORACLE), str(folder / "in.npz"), str(folder / "out.npz")], check=True)
    return dict(np.load(folder / "out.npz"))


def sample(key):
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == key)
    return read_sample(entry)[:2]


def features_of(crop):
    atoms = Grid().pad_atoms(len(crop.atoms.atom))
    return tile_features(crop, Grid(), len(crop.tokens), len(crop.rows.sampled), atoms)


@pytest.fixture(scope="module", params=["4hhb", "3l4q", "7pzb", "4hhb crop", "7pzb crop"])
def both(request, tmp_path_factory):
    """A crop, our features and the package's."""
    key, *cut = request.param.split()
    structure, alignments = sample(key)
    # Without organisms nothing is paired, and both lay sequences side by side.
    alone = {e: Alignment(a.tokens, a.deletions, np.full(len(a), UNPAIRED)) for e, a in alignments.items()}
    covered = [] if cut else pairs_of_copies(structure)
    template = [make_template(structure, structure, covered)] if covered else []
    crop = make_crop(structure, alone, template, crop_size=200 if cut else 10_000, max_msa_rows=16384, draw=(0, 0, 1))
    theirs = package_features(tmp_path_factory.mktemp("features"), structure, alone, crop.tokens, covered)
    return crop, features_of(crop), theirs


def test_same(both):
    _, ours, theirs = both
    for name in SAME.split():
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    np.testing.assert_array_equal(ours["res_type"].argmax(-1), theirs["res_type"])
    np.testing.assert_allclose(ours["profile"], theirs["profile"], atol=1e-6)
    real = ours["atom_pad_mask"] == 1
    np.testing.assert_array_equal(ours["atom_to_token"][real], theirs["atom_to_token"][real])
    assert not theirs["atom_to_token_empty"][real].any() and not theirs["token_to_rep_atom_empty"].any()


def test_coordinates(both):
    _, ours, theirs = both
    known = ours["token_disto_mask"] == 1
    np.testing.assert_array_equal(ours["disto_center"][known], theirs["disto_center"][known])
    # The package computes distances by a matrix product, which rounds some across a boundary.
    pairs = np.ix_(known, known)
    assert (ours["disto_target"][pairs] == theirs["disto_target"][pairs]).mean() > 0.9999
    known = ours["atom_resolved_mask"] == 1
    np.testing.assert_allclose(ours["coords"][known], theirs["coords"][0][known], atol=1e-3)
    assert not ours["coords"][~known].any()


def test_r_set(both):
    """The package lists the resolved residues of polymers; here they follow from the masks of tokens."""
    _, ours, theirs = both
    chosen = (ours["token_resolved_mask"] == 1) & (ours["mol_type"] != 3)
    np.testing.assert_array_equal(ours["token_to_center_atom"][chosen], theirs["r_set_to_rep_atom"])


def test_conformers(both):
    """The same shapes of all residues; the package leaves the last one unmoved."""
    crop, ours, theirs = both
    uid = crop.atoms.residue
    own, other = (side["ref_pos"][: len(uid)].astype(np.float64) for side in (ours, theirs))
    for residue in range(uid[-1] + 1):
        points = [side[uid == residue] for side in (own, other)]
        shapes = [np.linalg.norm(p[:, None] - p, axis=-1) for p in points]
        np.testing.assert_allclose(*shapes, atol=1e-3)
    last = uid == uid[-1]
    original = crop.structure.comp_pos[crop.structure.ref_atom[crop.atoms.atom[last]]]
    np.testing.assert_allclose(other[last], original, atol=1e-5)
    assert np.abs(own[last] - original).max() > 1e-3


def test_frames(both):
    _, ours, theirs = both
    index, mask = theirs["frames_idx"][0], theirs["frame_resolved_mask"][0]
    agree = (ours["token_resolved_mask"] == 1) & ~((ours["modified"] == 1) & (ours["mol_type"] == 0))
    assert agree.mean() > 0.8
    np.testing.assert_array_equal(ours["frame_resolved_mask"][agree], mask[agree])
    shown = agree & mask
    np.testing.assert_array_equal(ours["frames_idx"][shown], index[shown])


def test_paired_rows(tmp_path):
    """Rows in which all proteins have the same organism come first, in the package's order."""
    structure, alignments = sample("4hhb")
    crop = make_crop(structure, alignments, crop_size=10_000, max_msa_rows=16384, draw=(0, 0, 0))
    ours, theirs = features_of(crop), package_features(tmp_path, structure, alignments, crop.tokens, [])
    protein = ours["mol_type"] == 0
    paired = [int((side["msa_paired"][:, protein] == 1).all(axis=1).sum()) for side in (ours, theirs)]
    assert paired[0] == paired[1] > 400
    np.testing.assert_array_equal(*(side["msa"][: paired[0], protein] for side in (ours, theirs)))


def test_deletions(both):
    crop, ours, theirs = both
    assert not theirs["deletion_value"].any() and not theirs["has_deletion"].any()
    if any(segment.alignment.deletions.any() for segment in crop.rows.segments):
        assert ours["deletion_value"].any()
    np.testing.assert_array_equal(ours["has_deletion"], ours["deletion_value"] > 0)


def test_templates(both):
    """A protein's frames and all that hangs on them; where nothing is given, one empty template."""
    crop, ours, theirs = both
    for name in ("template_restype", "template_mask", "template_mask_cb", "visibility_ids"):
        if crop.templates or name != "visibility_ids":
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    standard = (ours["template_mask"] == 1) & (ours["template_restype"] != 22)
    np.testing.assert_array_equal(ours["template_mask_frame"][standard], theirs["template_mask_frame"][standard])
    assert ours["template_mask_frame"].shape[0] == 1 and bool(crop.templates) == ours["template_mask"].any()
    for name in ("template_frame_rot", "template_frame_t", "template_ca", "template_cb"):
        np.testing.assert_allclose(ours[name][standard], theirs[name][standard], atol=1e-4, err_msg=name)
