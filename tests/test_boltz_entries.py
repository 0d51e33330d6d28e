"""With the features ``boltz2``, all that the model gets is what the stock package makes: entries with alignments that
have deletions, whole and cropped, as in training and as in inference.

The structure, the tokens of the crop, the rows that training draws and how conformers are turned are given to both.
Not compared are what only the package has, and templates of crops, which it lays on the wrong tokens.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest

from cpfold_train.cli.bench import boltz_python
from cpfold_train.data.alignments.alignment import pack_alignments
from cpfold_train.data.features import msa
from cpfold_train.data.features.atoms import rotation_matrices
from cpfold_train.data.features.make_template import make_template
from cpfold_train.data.inputs.complex import Complex, crop_of
from cpfold_train.data.prepare.msas import align_entities, find_alignments
from cpfold_train.data.schema import FEATURES
from cpfold_train.data.stream.batch import Augmentation, make_crop, tile_features
from cpfold_train.data.structures.parse import entry_id, read_structure
from cpfold_train.data.structures.structure import ARRAYS
from cpfold_train.parallel.grid import Grid
from cpfold_train.vocabulary import BOLTZ2, BOND_TYPES, NONPOLYMER

pytestmark = pytest.mark.slow
STRUCTURES = [parent / "shared/structures" for parent in Path(__file__).parents]
STRUCTURES = next((folder for folder in STRUCTURES if folder.is_dir()), None)
ENTRIES = ["1bjp", "1k1a", "3l4q", "3u8v", "4hhb", "4i6p", "5kc1", "5zyh", "6m0j", "7a4d-assembly1", "7pzb", "7zzx"]
MODIFIED = "4dme"
"""An entry with phosphorylated residues; its alignment has no deletions, and gets some."""
LARGE = "5kc1", "7a4d-assembly1"
"""Whole, the package takes more than 10 GiB for these: they are cropped to 600 tokens."""
OWN = [
    "token_atom_start",
    "atoms_per_token",
    "chain_copies",
    "copy_coords",
    "copy_resolved",
    "atom_swaps",
    "sample_key",
    "num_tokens",
]
"""Features that the package does not have, or has in another form."""


def entry(name):
    (path,) = (path for path in (STRUCTURES / "entries").iterdir() if entry_id(path) == name)
    structure, _ = read_structure(path)
    structure.meta.update(id=name, interfaces=[])
    files = find_alignments(STRUCTURES / "msas", None, {name})[name]
    alignments = align_entities(structure, files, 16384, [])
    if name == MODIFIED:
        for alignment in alignments.values():
            alignment.deletions[1::3, 5] = 7
    return structure, alignments


def listed_links(name, structure):
    """Bonds of modified residues with their neighbours, as the entry lists them and the package takes them."""
    (path,) = (path for path in (STRUCTURES / "entries").iterdir() if entry_id(path) == name)
    read = gemmi.read_structure(str(path))
    read.setup_entities()
    names = [chain["name"] for chain in structure.meta["chains"]]
    found = []
    for link in read.connections:
        ends = []
        for partner in (link.partner1, link.partner2):
            residue = read[0].find_cra(partner).residue
            if link.type == gemmi.ConnectionType.Covale and residue is not None and residue.label_seq:
                here = (structure.asym_id == names.index(residue.subchain)) & structure.polymer
                (token,) = np.flatnonzero(here & (structure.res_index == residue.label_seq - 1))
                atoms = np.arange(*structure.atom_start[token : token + 2])
                named = structure.comp_atom_name[structure.ref_atom[atoms]] == partner.atom_name.encode()
                ends += atoms[named].tolist()
        # Those of other residues are among the structure's.
        if len(ends) == 2 and sorted(ends) not in structure.bond_atoms.tolist():
            found.append(sorted(ends))
    return np.array(found)


def drawn_rows(crop, structure, alignments):
    """Which of all rows the crop shows, but the first: those that an ascending draw can be."""
    whole = msa.assemble(structure, crop.tokens, alignments, 10**6, None, BOLTZ2)
    rows = np.concatenate([whole.sampled, whole.paired], axis=1)
    shown = np.concatenate([crop.rows.sampled, crop.rows.paired], axis=1)
    found, at = [], 0
    for row in shown:
        at += int(np.flatnonzero((rows[at:] == row).all(axis=1))[0])
        found.append(at)
        at += 1
    return np.array(found[1:])


def given_to_package(crop, alignments, max_rows, drawn=None, covered=(), links=None):
    """``links`` are bonds that the entry lists in place of those that the crop has added."""
    structure = crop.structure
    given = {name: getattr(structure, name) for name in ARRAYS} | pack_alignments(alignments)
    if links is not None:
        original, _ = entry(structure.meta["id"])
        given["bond_atoms"] = np.concatenate([original.bond_atoms, links])
        given["bond_type"] = np.append(original.bond_type, [BOND_TYPES.index("covalent")] * len(links))
    given |= {"tokens": crop.tokens, "max_rows": max_rows, "turns": rotation_matrices(crop.motions[:, :4])}
    given |= {"shifts": crop.motions[:, 4:], "meta": json.dumps(structure.meta), "templates": json.dumps(covered)}
    return given if drawn is None else given | {"drawn": drawn}


def in_package(folder, many):
    """What the package makes of each, in one process."""
    python = boltz_python()
    if not python:
        pytest.skip("the boltz package is absent: type pip install -e '.[boltz]'")
    if STRUCTURES is None:
        pytest.skip("shared/structures is not beside the checkout")
    paths = []
    for number, given in enumerate(many):
        paths += [folder / f"in{number}.npz", folder / f"out{number}.npz"]
        np.savez(paths[-2], **given)
    script = Path(__file__).parent / "oracle/boltz_features.py"
    subprocess.run([python, str(script), *map(str, paths)], check=True)
    return [dict(np.load(path)) for path in paths[1::2]]


def features_of(crop):
    atoms = Grid().pad_atoms(len(crop.atoms.atom))
    return tile_features(crop, Grid(), len(crop.tokens), len(crop.rows.sampled), atoms)


def compare(ours, theirs, leave_out=()):
    """All features; floating numbers to fp32's rounding, distances to the rounding of a matrix product."""
    real = ours["atom_pad_mask"] == 1
    compared = [name for name in FEATURES if name not in {*OWN, *leave_out}]
    for name in compared:
        own, other = ours[name], theirs[name]
        if name == "res_type":
            own = own.argmax(-1)
        elif name in ("coords", "frames_idx", "frame_resolved_mask"):
            # Of the one conformation.
            other = other[0]
        if name == "atom_to_token":
            own, other = own[real], other[real]
        if name == "disto_target":
            apart = np.abs(own.astype(int) - other)
            assert apart.max() <= 1, name
            assert (apart > 0).mean() < 3e-4, name
        elif own.dtype.kind == "f":
            tolerance = {"coords": 2e-3, "ref_pos": 2e-5, "template_frame_rot": 1e-4}.get(name, 1e-6)
            np.testing.assert_allclose(own, other, rtol=1e-6, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(own, other, err_msg=name)
    return len(compared)


@pytest.mark.parametrize("name", [*ENTRIES, MODIFIED])
def test_entry(name, tmp_path):
    structure, alignments = entry(name)
    size = 600 if name in LARGE else 10_000
    links = listed_links(name, structure) if name == MODIFIED else None
    assert name != MODIFIED or len(links) == 6
    assert any((alignment.deletions > 0).any() for alignment in alignments.values())
    cases, given = [], []
    for crop_size, kind in ((size, "spatial"), (150, "neighbourhood"), (150, "contiguous")):
        for training in (False, True):
            most = 400 if training else 3000
            crop = make_crop(
                structure,
                alignments,
                crop_size=crop_size,
                crop={kind: 1.0},
                max_msa_rows=most,
                augmentation=Augmentation(random_rows=training, random_depth=training),
                features=BOLTZ2,
                draw=(0, 1, len(cases)),
            )
            drawn = drawn_rows(crop, structure, alignments)
            if not training:
                np.testing.assert_array_equal(drawn, 1 + np.arange(len(drawn)))
            cases.append(crop)
            given.append(given_to_package(crop, alignments, most, drawn if training else None, links=links))
    for crop, theirs in zip(cases, in_package(tmp_path, given), strict=True):
        assert compare(features_of(crop), theirs) == 49


def test_templates_of_modified_residues(tmp_path):
    """A whole entry with itself as template."""
    structure, alignments = entry(MODIFIED)
    covered = [(i, i) for i, chain in enumerate(structure.meta["chains"]) if chain["type"] == "protein"]
    template = make_template(structure, structure, covered)
    settings = {"crop_size": 10_000, "max_msa_rows": 100, "features": BOLTZ2, "draw": (0, 0, 0)}
    crop = make_crop(structure, alignments, [template], **settings)
    (theirs,) = in_package(tmp_path, [given_to_package(crop, alignments, 100, covered=covered)])
    ours = features_of(crop)
    # A template does not say where a modified residue's first atom is, which the package takes for these.
    kept = ours["modified"] == 0
    for side in (ours, theirs):
        for atom in ("template_ca", "template_cb", "template_mask_cb"):
            side[atom] = side[atom][:, kept]
    compare(ours, theirs)
    assert (ours["template_mask"] > ours["template_mask_frame"]).any()


def test_a_prediction(tmp_path):
    """Nothing is known of where atoms are: the package takes all as present, at the origin."""
    structure, alignments = entry("3l4q")
    unknown = replace(structure, coords=np.zeros_like(structure.coords), resolved=np.zeros_like(structure.resolved))
    crop = crop_of(Complex(unknown, alignments), None, 3000, 0, BOLTZ2)
    present = replace(crop, structure=replace(unknown, resolved=np.ones_like(structure.resolved)))
    (theirs,) = in_package(tmp_path, [given_to_package(present, alignments, 3000)])
    unread = {name for name in FEATURES if "resolved" in name or "disto" in name}
    ours = features_of(crop)
    # A prediction finds frames of ligands in its own coordinates.
    polymer = ours["mol_type"] != NONPOLYMER
    np.testing.assert_array_equal(ours["frames_idx"][polymer], theirs["frames_idx"][0][polymer])
    compare(ours, theirs, leave_out={*unread, "frames_idx"})
