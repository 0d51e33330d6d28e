"""The tables and the picture of what is in shards."""

import numpy as np
import pytest
from PIL import Image

from cpfold_train.__main__ import main
from tests.structures import write_a3m, write_tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_tiny(folder / "tiny.cif")
    write_tiny(folder / "bare.cif")
    write_a3m(folder / "tiny_xA_a.a3m", ("query", "XMGSAX"), ("a", "-MGSA-"), ("b", "-MGA--"))
    options = ["--msa", str(folder), "--min-residues", "4", "--workers", "1"]
    assert main(["prepare", str(folder), str(folder / "out"), *options]) == 0
    return folder / "out"


def shown(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_all_samples(shards, capsys):
    lines = shown(capsys, shards)
    assert " ".join(lines[0]) == "2 samples, 12 tokens, 2 polymer chains, 0 ligands, 1 clusters"
    assert ["tiny", "6", "1", "6", "4", "0", "3", "3.25", "1"] in lines
    assert ["bare", "6", "1", "6", "4", "0", "0", "3.25", "1"] in lines


def test_one_sample(shards, tmp_path, capsys):
    lines = shown(capsys, shards / "train-000000.tar", "TINY", "--out", tmp_path / "new" / "t.png", "--crop", "3", "9")
    assert ["A", "(xA)", "protein", "0", "0", "6", "4", "1-4", "(2-5)", "3", "protein:bare_xA"] in lines
    assert ["SEP", "11", "0", "1"] in lines and ["bonds:", "2", "other"] not in lines
    pixels = np.asarray(Image.open(tmp_path / "new" / "t.png").convert("RGB"))
    assert pixels.shape[1] > 1200 and pixels.std() > 20


@pytest.mark.parametrize("key", ["4hhb", "7pzb"])
def test_real_samples_are_drawn(key, tmp_path, capsys):
    shown(capsys, "tests/data", key, "--out", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 100_000


def test_it_says_what_to_type(shards, capsys):
    assert main(["inspect", str(shards), "9zzz"]) == 2
    assert "9zzz" in capsys.readouterr().err
    assert main(["inspect", "nowhere/*.tar"]) == 2
    assert "nowhere/*.tar" in capsys.readouterr().err
    assert main(["inspect", str(shards), "tiny", "--crop", "0"]) == 2
    assert "--crop" in capsys.readouterr().err
