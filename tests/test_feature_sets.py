"""The features ``boltz2`` and ``corrected``: which a run makes, what a checkpoint says, and what is told.

That ``boltz2`` is what the stock package makes: tests/test_boltz_entries.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpfold_train.checkpoints.export import boltz_checkpoint, model_config
from cpfold_train.checkpoints.features import features_of
from cpfold_train.checkpoints.load import choose_features
from cpfold_train.config.compose import compose
from cpfold_train.data.alignments.alignment import UNPAIRED, Alignment
from cpfold_train.data.features import msa
from cpfold_train.data.stream.batch import Augmentation, make_crop, tile_features
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.errors import ConfigError
from cpfold_train.parallel.grid import Grid
from cpfold_train.simulate.batch import batches_of_data
from cpfold_train.testing.step_case import SETTINGS, settings
from cpfold_train.training.apply import prepare_module
from cpfold_train.vocabulary import BOLTZ2, CORRECTED, PROTEIN, UNKNOWN


def sample(key="3l4q"):
    (entry,) = (entry for entry in open_shards(["tests/data/*.tar"]) if entry.key == key)
    return read_sample(entry)[:2]


def features_made(crop):
    atoms = Grid().pad_atoms(len(crop.atoms.atom))
    return tile_features(crop, Grid(), len(crop.tokens), len(crop.rows.sampled), atoms)


@pytest.mark.parametrize(
    ("typed", "features"),
    [
        ([], CORRECTED),
        (["model=small"], CORRECTED),
        (["model=boltz2"], BOLTZ2),
        (["recipe=finetune_boltz2_large_crop"], BOLTZ2),
        (["model=boltz2", "data.features=corrected"], CORRECTED),
        (["data.features=boltz2"], BOLTZ2),
    ],
)
def test_which_features_a_run_makes(typed, features):
    assert compose(typed).data.features == features


def test_others_are_refused():
    with pytest.raises(ConfigError, match=r"data\.features=boltz1 .*data\.features=boltz2 or data\.features=corrected"):
        compose(["data.features=boltz1"])


def test_features_reach_training_and_its_checkpoints():
    batches, written = {}, {}
    for features in (BOLTZ2, CORRECTED):
        # An entry whose alignment has deletions.
        config = compose(
            [*SETTINGS, "data.train=[tests/data/*.tar]", "data.max_msa_rows=40", f"data.features={features}"]
        )
        batches[features] = batches_of_data(config, Grid(), 2)
        written[features] = dict(prepare_module(config).hparams)
    assert not any(batch["deletion_value"].any() for batch in batches[BOLTZ2])
    assert any(batch["deletion_value"].any() for batch in batches[CORRECTED])
    assert {features: features_of({"hyper_parameters": x}) for features, x in written.items()} == {
        BOLTZ2: BOLTZ2,
        CORRECTED: CORRECTED,
    }


def test_what_checkpoints_say(tmp_path):
    config = settings()
    module = prepare_module(replace(config, data=replace(config.data, features=BOLTZ2)))
    ours = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    older = {"state_dict": {}, "hyper_parameters": {"model": {k: v for k, v in module.hparams["model"].items()}}}
    del older["hyper_parameters"]["model"]["features"]
    package = {"state_dict": {}, "hyper_parameters": {"token_s": 384}}
    corrected = replace(model_config(ours, tmp_path), features=CORRECTED)
    exported = boltz_checkpoint(corrected, ours, "raw", tmp_path)
    for name, given, features in (
        ("ours", ours, BOLTZ2),
        ("older", older, CORRECTED),
        ("package", package, BOLTZ2),
        ("exported", exported, CORRECTED),
    ):
        path = tmp_path / f"{name}.ckpt"
        torch.save(given, path)
        assert choose_features(path, None) == (features, None)
        assert choose_features(path, features) == (features, None)
        (other,) = {BOLTZ2, CORRECTED} - {features}
        assert choose_features(path, other) == (
            other,
            f"{path} is trained with the features {features}, and gets {other}: "
            f"type --features {features} to keep them",
        )
    assert model_config(older, tmp_path).features == CORRECTED


def test_a_resume_and_weights_of_other_features_are_told(tmp_path, capsys):
    config = settings()
    assert config.data.features == CORRECTED
    module = prepare_module(replace(config, data=replace(config.data, features=BOLTZ2)))
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    path = tmp_path / "boltz2.ckpt"
    torch.save(checkpoint, path)
    capsys.readouterr()
    own = prepare_module(config)
    assert capsys.readouterr().err == ""
    own.trainer = SimpleNamespace(is_global_zero=True, callbacks=[])
    own.on_load_checkpoint(checkpoint)
    told = "is trained with the features boltz2, and gets corrected: type data.features=boltz2 to keep them\n"
    assert capsys.readouterr().err == f"note: the checkpoint {told}"
    prepare_module(replace(config, model=replace(config.model, init_from=str(path))))
    assert capsys.readouterr().err == f"note: {path} {told}"
    module.trainer = own.trainer
    module.on_load_checkpoint(checkpoint)
    assert capsys.readouterr().err == ""


def test_rows_are_paired_as_in_boltz2():
    """Sequences of pairs come again and fill the chains without the organism; several of one chain are a pair."""
    keys = [np.array([-1, 7, -1, 8, 8]), np.array([-1, 7, 9])]
    rows, paired = msa.pair(keys, BOLTZ2)
    assert rows.tolist() == [[0, 0], [1, 1], [3, 1], [4, 2], [1, -1], [2, -1], [3, -1], [4, -1]]
    assert paired.astype(int).tolist() == [[1, 1], [1, 1], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    rows, paired = msa.pair([np.array([-1, 7, 7])], BOLTZ2)
    assert rows[:, 0].tolist() == [0, 1, 2, 1, 2]
    assert paired[:, 0].tolist() == [True, True, True, False, False]


def test_rows_and_profile():
    """Training draws rows, all else shows the first ones; the profile is of those that are shown."""
    structure, alignments = sample()
    given = {"crop_size": 10_000, "max_msa_rows": 20, "features": BOLTZ2, "draw": (0, 0, 0)}
    first = make_crop(structure, alignments, **given)
    drawn = make_crop(structure, alignments, **given, augmentation=Augmentation(random_rows=True))
    whole, _ = msa.pair([segment.alignment.keys for segment in first.rows.segments], BOLTZ2)
    np.testing.assert_array_equal(first.rows.sampled, whole[:20])
    assert len(drawn.rows.sampled) == 20
    assert (drawn.rows.sampled != whole[:20]).any()
    for crop in (first, drawn):
        features = features_made(crop)
        expected = (features["msa"][..., None] == np.arange(33)).mean(axis=0)
        np.testing.assert_allclose(features["profile"], expected, atol=1e-6)
        assert not features["has_deletion"].any()
        assert not features["deletion_mean"].any()


def test_an_alignment_of_another_sequence_is_not_shown():
    res_type = np.array([5, 6, 12, UNKNOWN[PROTEIN]], dtype=np.int8)
    rows = np.array([[5, 6, 12, 9], [5, 7, 12, 8]], dtype=np.int8)
    given = Alignment(rows, np.ones((2, 4), np.uint8), np.full(2, UNPAIRED))
    shown = msa._as_in_boltz2(given, res_type)
    assert shown.tokens.tolist() == [res_type.tolist(), rows[1].tolist()]
    assert shown.deletions.tolist() == [[1] * 4, [0] * 4]
    assert len(msa._as_in_boltz2(given, res_type[::-1].copy())) == 1


def test_atoms_as_in_boltz2():
    """Unresolved atoms are at minus the centre, the last conformer is not moved; on three ranks as on one."""
    structure, alignments = sample()
    given = {"crop_size": 80, "crop": {"contiguous": 1.0}, "max_msa_rows": 2, "draw": (0, 0, 0)}
    crop = make_crop(structure, alignments, features=BOLTZ2, **given)
    found = features_made(crop)
    known = found["atom_resolved_mask"][: len(crop.atoms.atom)] == 1
    middle = structure.coords[crop.atoms.atom][known].mean(axis=0)
    assert not known.all()
    coords = found["coords"][: len(known)]
    np.testing.assert_allclose(coords[~known], np.broadcast_to(-middle, coords[~known].shape), atol=1e-3)
    np.testing.assert_array_equal(
        coords[known], features_made(make_crop(structure, alignments, **given))["coords"][: len(known)][known]
    )
    last = crop.atoms.residue == crop.atoms.residue[-1]
    np.testing.assert_array_equal(
        found["ref_pos"][: len(known)][last], structure.comp_pos[structure.ref_atom[crop.atoms.atom[last]]]
    )
    a = 3 * Grid().pad_atoms(-(-len(known) // 3))
    (n, s) = (81, 2)
    whole = tile_features(crop, Grid(), n, s, a)
    for rank in range(3):
        part = tile_features(crop, Grid(1, 3, 1, rank), n, s, a)
        for name in ("ref_pos", "coords"):
            np.testing.assert_array_equal(part[name], whole[name][rank * a // 3 : (rank + 1) * a // 3])


def test_modified_residues_have_no_frame_in_boltz2():
    structure, alignments = sample()
    modified = np.zeros(len(structure), bool)
    modified[3] = True
    res_type = np.where(modified, UNKNOWN[PROTEIN], structure.res_type).astype(np.int8)
    changed = replace(structure, modified=modified, res_type=res_type)
    given = {"crop_size": 10_000, "max_msa_rows": 2, "draw": (0, 0, 0)}
    theirs, ours = (
        features_made(make_crop(changed, alignments, features=features, **given)) for features in (BOLTZ2, CORRECTED)
    )
    start = theirs["token_atom_start"][3]
    assert theirs["frames_idx"][3].tolist() == [start] * 3
    assert theirs["token_to_rep_atom"][3] == theirs["token_to_center_atom"][3] == start
    assert ours["frames_idx"][3].tolist() == [start, start + 1, start + 2]
    assert (theirs["frames_idx"] != ours["frames_idx"]).any(axis=1)[structure.polymer].sum() == 1


def test_what_a_sample_gives_away():
    """Contacts are told without their distance; pockets are of residues whose center atom is resolved."""
    structure, alignments = sample("4hhb")
    hints = Augmentation(pocket=0.9, contact=0.9)
    found = {}
    for features in (BOLTZ2, CORRECTED):
        given = {"crop_size": 150, "max_msa_rows": 1, "augmentation": hints, "features": features}
        crops = [make_crop(structure, alignments, **given, draw=(0, 0, i)) for i in range(6)]
        conditions = [condition for crop in crops for condition in crop.conditions]
        found[features] = {(c.kind, c.threshold > 0) for c in conditions}
    assert found[BOLTZ2] == {(2, True), (3, True), (4, False)}
    assert found[CORRECTED] == {(2, True), (3, True), (4, True)}
