"""The commands from a query to files and scores, with a stand-in for the model."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from cpfold_train.__main__ import main
from cpfold_train.checkpoints.load import choose_weights, load_model
from cpfold_train.data.inputs.inputs import find_queries, has_truth
from cpfold_train.data.stream.shards import open_shards, read_sample
from cpfold_train.data.structures.parse import read_structure
from cpfold_train.errors import ConfigError
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, ModelConfig
from cpfold_train.parallel.grid import Grid, join_tiles
from tests.structures import write_a3m, write_tiny

ROOT = Path(__file__).resolve().parents[1]
SHARD = str(ROOT / "tests" / "data" / "train-000000.tar")


@pytest.fixture(scope="module")
def command(forked_runs):
    """Run a subcommand on so many ranks, with the stand-in."""

    def run(ranks, *arguments):
        return forked_runs.run(ranks, list(map(str, arguments)), "tests.stand_in:main")

    return run


@pytest.fixture(scope="module")
def predicted(command):
    """Predict on so many ranks, which must succeed."""

    def run(ranks, out, *arguments):
        process = command(ranks, "predict", *arguments, "--accelerator", "cpu", "--out", out)
        assert process.returncode == 0, process.stderr[-3000:]
        return process

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A structure file, sequences with an alignment, and a file that cannot be read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny(folder / "tiny.cif")
    (folder / "job.fasta").write_text(">A|protein|own.a3m\nMKSAG\n>B|ccd\nATP\n")
    write_a3m(folder / "own.a3m", ("query", "MKSAG"), ("other", "MRSA-"))
    return folder


@pytest.fixture(scope="module")
def on_1x1(predicted, tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("1x1")
    predicted(1, out, "model.ckpt", SHARD, folder, "--id", "4hhb", "--id", "job", "--samples", 3, "--max-msa-rows", 8)
    return out


@pytest.fixture(scope="module")
def on_1x2(predicted, tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("1x2")
    options = ("--id", "4hhb", "--id", "job", "--samples", 3, "--max-msa-rows", 8, "--grid", "1x2")
    predicted(2, out, "model.ckpt", SHARD, folder, *options)
    return out


def test_inputs(folder):
    queries = find_queries([SHARD, str(folder)])
    assert [query.id for query in queries] == ["3l4q", "4hhb", "7pzb", "job", "tiny"]
    truth = {query.id: has_truth(query.read().structure) for query in queries}
    assert truth == {"3l4q": True, "4hhb": True, "7pzb": True, "job": False, "tiny": True}
    assert [query.id for query in find_queries([str(folder)], ids=["Job"])] == ["job"]


def test_alignments_of_structure_files(folder, tmp_path):
    write_a3m(tmp_path / "tiny_A_own.a3m", ("query", "XMGSAX"), ("other", "XMG-AX"))
    # Its name ends where the other's goes on.
    write_a3m(tmp_path / "tiny_2_A_own.a3m", ("query", "XMGSAX"), ("other", "XMG-AX"), ("more", "X-GSAX"))
    (tmp_path / "tiny_2.cif").write_bytes((folder / "tiny.cif").read_bytes())
    query, other = find_queries([str(folder / "tiny.cif"), str(tmp_path / "tiny_2.cif")], msa=tmp_path)
    assert {entity: len(rows) for entity, rows in other.read().alignments.items()} == {0: 3}
    assert {entity: len(rows) for entity, rows in query.read().alignments.items()} == {0: 2}


@pytest.mark.parametrize(
    ("inputs", "ids", "told"),
    [
        (["gone.cif"], [], "gone.cif"),
        (["notes.txt"], [], "notes.txt"),
        ([SHARD, SHARD], [], "3l4q"),
        ([SHARD], ["1abc"], "1abc"),
    ],
)
def test_wrong_inputs_are_told(inputs, ids, told):
    with pytest.raises(ConfigError) as error:
        find_queries(inputs, ids=ids)
    assert told in str(error.value)


def test_results_of_a_query(on_1x1):
    """The sample with the least noise is the most confident and so the first."""
    out = on_1x1 / "4hhb"
    files = [f"4hhb_model_{k}.{kind}" for k in range(3) for kind in ("cif", "npz")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "4hhb.json", "4hhb.png"])
    about = json.loads((out / "4hhb.json").read_text())
    assert (about["tokens"], about["truth_known"]) == (746, True)
    assert [sample["file"] for sample in about["samples"]] == files[::2]
    scores = [sample["confidence_score"] for sample in about["samples"]]
    assert scores == pytest.approx([10, 1, 1 / 3])
    structure = read_sample(next(entry for entry in open_shards([SHARD]) if entry.key == "4hhb"))[0]
    read = read_structure(out / "4hhb_model_0.cif")[0]
    both = structure.resolved & ~np.isin(structure.comp_atom_name[structure.ref_atom], (b"NH1", b"NH2"))
    assert read.resolved.all()
    moved = read.coords[both] - structure.coords[both]
    assert (moved - moved.mean(0)).std() == pytest.approx(0.1, rel=0.05)
    token = read.atom_token
    assert np.allclose(read.b_factor, 99 * (1 - token / (2 * len(read))), atol=0.006)
    with np.load(out / "4hhb_model_0.npz") as arrays:
        n = len(structure)
        assert arrays["plddt"].shape == (n,)
        expected = np.arange(n)[:, None] * 1000 + np.arange(n) + 0.1
        assert np.allclose(arrays["pae"], expected)
        assert np.allclose(arrays["pde"], expected + 0.5)
    assert Image.open(out / "4hhb.png").size == (1500, 850)


def test_tiles_come_together():
    whole = np.arange(36).reshape(6, 6)
    grids = [Grid(2, 3, rank=rank) for rank in range(6)]
    tiles = [whole[slice(*grid.row_tokens(6)), slice(*grid.col_tokens(6))] for grid in grids]
    assert np.array_equal(join_tiles(tiles, grids[0], np.concatenate), whole)


def test_sequences_alone(on_1x1):
    about = json.loads((on_1x1 / "job" / "job.json").read_text())
    assert (about["tokens"], about["truth_known"]) == (5 + 31, False)
    assert read_structure(on_1x1 / "job" / "job_model_0.cif")[0].resolved.all()


@pytest.mark.parametrize("name", ["4hhb", "job"])
def test_the_grid_does_not_change_the_results(on_1x1, on_1x2, name):
    for path in (on_1x1 / name).glob("*.cif"):
        assert (on_1x2 / name / path.name).read_text() == path.read_text()
    for path in (on_1x1 / name).glob("*.npz"):
        with np.load(path) as first, np.load(on_1x2 / name / path.name) as second:
            assert sorted(first) == sorted(second)
            assert all(np.array_equal(first[key], second[key]) for key in first)
    one, two = (json.loads((out / name / f"{name}.json").read_text()) for out in (on_1x1, on_1x2))
    assert (one.pop("grid"), two.pop("grid")) == ("1x1", "1x2")
    assert one == two


def test_what_is_there_is_skipped_and_what_is_half_there_is_not(predicted, on_1x1, folder):
    options = ("model.ckpt", SHARD, folder, "--id", "4hhb", "--id", "job", "--samples", 3, "--max-msa-rows", 8)
    hemoglobin = (on_1x1 / "4hhb" / "4hhb_model_0.cif").stat().st_mtime_ns
    kept = {path.name: path.read_bytes() for path in (on_1x1 / "job").iterdir()}
    (on_1x1 / "job" / "job.json").unlink()
    try:
        process = predicted(1, on_1x1, *options)
        assert "1 of 2 are in" in process.stdout
        assert "1 of 1 predicted" in process.stdout
        assert (on_1x1 / "4hhb" / "4hhb_model_0.cif").stat().st_mtime_ns == hemoglobin
        names = {"job.json", "job.png", *(f"job_model_{k}.{kind}" for k in range(3) for kind in ("cif", "npz"))}
        assert {path.name for path in (on_1x1 / "job").iterdir()} == names
    finally:
        for name, data in kept.items():
            (on_1x1 / "job" / name).write_bytes(data)


def test_predictions_name_their_weights_and_are_kept_apart(command, on_1x1, folder):
    about = json.loads((on_1x1 / "job" / "job.json").read_text())
    assert about["checkpoint"] == {"path": "model.ckpt", "step": 7, "weights": "raw", "fingerprint": "model.ckpt"}
    assert (about["grid"], about["precision"]) == ("1x1", "32-true")
    kept = {path: path.read_bytes() for path in (on_1x1 / "job").iterdir()}

    def again(checkpoint, *options):
        arguments = [checkpoint, folder, "--id", "job", "--accelerator", "cpu", "--out", on_1x1, "--max-msa-rows", 8]
        process = command(1, "predict", *arguments, *(options or ("--samples", 3)))
        assert {path: path.read_bytes() for path in (on_1x1 / "job").iterdir()} == kept
        return process

    for other, told in (
        (again("other.ckpt"), "has job already, of model.ckpt, step 7, raw weights: type another --out"),
        (again("model.ckpt", "--samples", 3, "--weights", "average"), "step 7, raw weights"),
        (again("model.ckpt", "--samples", 2, "--seed", 1), "has job already, with --samples 3 --seed 0"),
    ):
        assert other.returncode == 2
        assert told in other.stderr and other.stderr.count("\n") == 1
    assert again("model.ckpt", "--samples", 3, "--crop", 8, "--grid", "1x1").returncode == 0


def test_without_confidence_and_with_a_bad_input(command, tmp_path, folder):
    """A file that cannot be read does not keep the others from being predicted. The crop is of the tokens' stretch."""
    (folder / "bad.yaml").write_text("sequences: []\n")
    try:
        options = ["--accelerator", "cpu", "--samples", 1, "--crop", 16, "--grid", "1x2", "--out", tmp_path]
        chosen = ["--id", "bad", "--id", "tiny", "--id", "7pzb"]
        process = command(2, "predict", "plain", folder, SHARD, *options, *chosen)
    finally:
        (folder / "bad.yaml").unlink()
    assert process.returncode == 2
    assert re.search("1 of 3 .*: bad: bad.yaml: ", process.stderr)
    assert "2 of 3 " in process.stdout
    assert sorted(path.name for path in (tmp_path / "7pzb").iterdir()) == ["7pzb.json", "7pzb.png", "7pzb_model_0.cif"]
    read = read_structure(tmp_path / "7pzb" / "7pzb_model_0.cif")[0]
    assert len(np.unique(read.atom_token[read.resolved])) == 16


def test_a_failure_names_the_input_and_its_size(command, folder, tmp_path):
    """On one of two ranks, which ends both."""
    options = ["--accelerator", "cpu", "--samples", 1, "--grid", "1x2", "--out", tmp_path]
    process = command(2, "predict", "broken", folder / "job.fasta", *options)
    assert process.returncode != 0
    assert re.search(r"job \(36 tokens, 63 atoms\) .*MemoryError: nothing is left", process.stderr)
    assert not list(tmp_path.glob("*/*.json"))


MODEL = {
    "token_s": 16,
    "token_z": 8,
    "msa": {"msa_s": 8, "msa_blocks": 1, "pairwise_head_width": 4},
    "pairformer": {"num_blocks": 1, "num_heads": 2, "pairwise_head_width": 4},
    "atoms": {"atom_s": 8, "atom_z": 4, "atom_encoder_depth": 1, "atom_decoder_depth": 1},
    "diffusion": {"token_transformer_depth": 1, "token_transformer_heads": 2, "dim_fourier": 8},
    "template": {"template_dim": 8, "template_blocks": 1, "pairwise_head_width": 4},
    "confidence": {"pairformer": {"num_blocks": 1, "num_heads": 2, "pairwise_head_width": 4}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As training writes it, of a small model whose parameters are random, those included that start at zero."""
    model = CoFolding(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), MODEL)), MemoryConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    torch.save({"state_dict": weights, "hyper_parameters": {"model": MODEL}, "epoch": 0}, path)
    return path


def test_the_model_itself(forked_runs, checkpoint, folder, tmp_path):
    """The same structures on 1x1 and 1x2, from a checkpoint alone."""
    options = ["--id", "job", "--id", "tiny", "--samples", 2, "--sampling-steps", 3, "--recycling-steps", 1]
    options += ["--precision", "64-true", "--accelerator", "cpu"]
    for ranks in (1, 2):
        arguments = ["predict", checkpoint, folder, *options, "--grid", f"1x{ranks}", "--out", tmp_path / str(ranks)]
        process = forked_runs.run(ranks, list(map(str, arguments)), "cpfold_train.__main__:main")
        assert process.returncode == 0, process.stderr[-3000:]
    for name, sample in itertools.product(("job", "tiny"), range(2)):
        first, second = (tmp_path / rank / name / f"{name}_model_{sample}.cif" for rank in ("1", "2"))
        a, b = (read_structure(path)[0] for path in (first, second))
        assert a.coords.std() > 0.1
        assert np.allclose(a.coords, b.coords, atol=0.0011)
        assert np.allclose(a.b_factor, b.b_factor, atol=0.011)
        with np.load(first.with_suffix(".npz")) as x, np.load(second.with_suffix(".npz")) as y:
            assert sorted(x) == sorted(y) == ["pae", "pde", "plddt"]
            assert x["pae"].shape == x["pde"].shape == (len(a), len(a))
            assert all(np.allclose(x[key], y[key], rtol=1e-5) for key in x)
    for name in ("job", "tiny"):
        one, two = (json.loads((tmp_path / rank / name / f"{name}.json").read_text()) for rank in ("1", "2"))
        confidence = [sample["confidence_score"] for sample in one["samples"]]
        assert confidence == sorted(confidence, reverse=True)
        for x, y in zip(one["samples"], two["samples"]):
            assert x.pop("file") == y.pop("file")
            assert {"ptm", "iptm", "complex_plddt", "pair_chains_iptm"} < set(x)
            assert all(np.allclose(x[score], y[score]) for score in x)


@pytest.mark.slow
def test_the_command_starts_its_ranks(checkpoint, folder, tmp_path):
    """As a user does it: ``python -m``, which starts the second rank by itself."""
    options = ["--sampling-steps", 2, "--samples", 1, "--recycling-steps", 0, "--grid", "1x2", "--accelerator", "cpu"]
    arguments = ["predict", checkpoint, folder / "job.fasta", "--out", tmp_path, *options]
    process = subprocess.run(
        [sys.executable, "-m", "cpfold_train", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "1 of 1 predicted" in process.stdout
    assert "input 1/1  job (36 tokens)\n" in process.stdout and "\r" not in process.stdout
    assert read_structure(tmp_path / "job" / "job_model_0.cif")[0].resolved.all()


def test_average_and_raw_weights(checkpoint, tmp_path):
    """In a checkpoint of training, ``state_dict`` is the average, and the weights under training are another entry."""
    held = torch.load(checkpoint)
    path = tmp_path / "last.ckpt"
    raw = {name: x + 1 for name, x in held["state_dict"].items()}
    torch.save(held | {"current_model_state": raw, "global_step": 5}, path)
    for weights, expected in (("average", held["state_dict"]), ("raw", raw)):
        for name, value in load_model(path, weights).state_dict().items():
            assert torch.equal(value, expected[f"model.{name}"])
    chosen = choose_weights(path, None)
    assert (chosen.step, chosen.weights) == (5, "average")
    assert choose_weights(checkpoint, None).weights == "raw"
    with pytest.raises(ConfigError, match="--weights raw"):
        choose_weights(checkpoint, "average")


def test_a_fingerprint_is_of_the_content(checkpoint, tmp_path):
    copy, other = tmp_path / "copy.ckpt", tmp_path / "last.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    held = torch.load(checkpoint)
    next(iter(held["state_dict"].values())).view(-1)[0] += 1e-3
    torch.save(held, other)
    first, same, changed = (choose_weights(path, None).fingerprint for path in (checkpoint, copy, other))
    assert first == same != changed


def test_other_checkpoints_are_refused(checkpoint, tmp_path):
    path = tmp_path / "other.ckpt"
    held = torch.load(checkpoint)
    held["state_dict"].popitem()
    torch.save(held, path)
    with pytest.raises(ConfigError, match=r"other\.ckpt"):
        load_model(path, "raw")
    path.write_text("no checkpoint")
    with pytest.raises(ConfigError, match=r"other\.ckpt"):
        load_model(path, "raw")


def test_evaluate(on_1x1, tmp_path, capsys):
    report, table = tmp_path / "scores.json", tmp_path / "scores.csv"
    assert main(["evaluate", str(on_1x1), SHARD, "--json", str(report), "--csv", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "job" in shown
    assert "mean, first" in shown
    found = json.loads(report.read_text())
    lddt = [sample["lddt"] for sample in found["samples"]]
    assert len(lddt) == 3
    assert lddt[0] > 0.95
    assert lddt == sorted(lddt, reverse=True)
    assert found["samples"][0]["rmsd"] == pytest.approx(0.1 * 3**0.5, rel=0.1)
    assert len(found["samples"][0]["ligands"]) == 4
    assert found["means"]["mean of the first"]["lddt"] == lddt[0]
    assert len(table.read_text().splitlines()) == 4


def test_evaluate_refuses_what_has_no_truth(folder, tmp_path, capsys):
    assert main(["evaluate", str(folder), SHARD]) == 2
    assert SHARD in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), SHARD]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_wrong_options_are_told(capsys):
    for options, told in (
        (["--samples", "0"], "--samples 0"),
        (["--grid", "2"], "ROWSxCOLUMNS"),
        (["--sampling-steps", "1"], "--sampling-steps"),
        (["--out", SHARD], SHARD),
    ):
        assert main(["predict", "model.ckpt", SHARD, "--out", "out", "--accelerator", "cpu", *options]) == 2
        assert told in capsys.readouterr().err
