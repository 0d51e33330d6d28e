"""The command as typed: what it makes of a folder, how it goes on after an interruption, what it says."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import webdataset as wds
from PIL import Image

from cpfold_train.__main__ import main
from cpfold_train.data.prepare import work
from cpfold_train.data.prepare.convert import Conversion
from cpfold_train.data.prepare.report import write_report
from cpfold_train.data.stream.shards import index_path, open_shards, read_sample
from cpfold_train.data.structures.parse import read_structure
from cpfold_train.vocabulary import GAP, TOKEN_IDS
from tests.structures import write_a3m, write_mmcif, write_tiny


@pytest.fixture
def folder(tmp_path):
    """A folder with two good files, one that is cut off and one without polymers, and alignments."""
    entries, alignments = tmp_path / "entries", tmp_path / "msas"
    entries.mkdir()
    alignments.mkdir()
    write_tiny(entries / "tiny.cif")
    write_tiny(entries / "again.cif")
    (entries / "broken.cif").write_text("data_X\nloop_\n_atom_site.id\n_atom_site.x\n1\n")
    write_mmcif(entries / "wet.cif", [("D", 3, [(1, "HOH")])], {1: ["GLY"]}, {1: "polypeptide(L)"})
    write_a3m(alignments / "tiny_xA_good.a3m", ("query", "XMGSAX"), ("a", "-MGSA-"))
    write_a3m(alignments / "tiny_xA_bad.a3m", ("query", "WWWWWWW"))
    write_a3m(alignments / "tiny_xZ_none.a3m", ("query", "MGSA"))
    write_a3m(alignments / "other_A_x.a3m", ("query", "MGSA"))
    return entries, alignments


def prepare(folder, out, *options):
    entries, alignments = folder
    options = ["--min-residues", "4", *options]
    options += [] if "--workers" in options else ["--workers", "1"]
    return main(["prepare", str(entries), str(out), "--msa", str(alignments), *options])


def report_of(out):
    report = json.loads((out / "report.json").read_text())
    return report, {entry["key"]: entry for entry in report["entries"]}


def test_report(folder, tmp_path, capsys):
    assert prepare(folder, tmp_path / "out", "--val", "again") == 0
    report, entries = report_of(tmp_path / "out")
    assert (report["kept"], report["train"], report["val"], report["dropped"]) == (2, 1, 1, 2)
    assert entries["broken"]["dropped"].startswith("broken.cif")
    assert entries["wet"]["dropped"].startswith("wet.cif ")
    problems = " ".join(entries["tiny"]["problems"])
    assert "tiny_xA_bad.a3m" in problems and "tiny_xZ_none.a3m" in problems
    assert entries["tiny"]["removed"] == {
        "fewer than 4 resolved residues": 1,
        "neighbouring C-alphas more than 10 Å apart": 1,
    }
    assert entries["tiny"]["left_out"]["water"] == 1 and entries["tiny"]["msa_depth"] == {"0": 2}
    assert report["unused_files"] == ["other_A_x.a3m"] and report["val_similar_to_train"] == ["again"]
    assert report["shards"] == ["train-000000.tar", "val-000000.tar"]
    shown = capsys.readouterr().out
    assert "2 of 4 entries kept (1 train, 1 val)" in shown and "again (val)" in shown and "broken.cif" in shown
    assert Image.open(tmp_path / "out" / "report.png").width > 1000
    assert not (tmp_path / "out" / ".work").exists()


def test_report_of_many(tmp_path, capsys):
    """Thousands of entries are counted by reason, with the first of each; numbers do not tell reasons apart."""
    results = [
        Conversion(f"e{i}", f"e{i}.cif", dropped=f"{i} residues are fewer than --min-residues 16") for i in range(9)
    ]
    results += [Conversion(f"{i}f", f"{i}f.cif", dropped=f"{i}f.cif holds no chain") for i in range(200)]
    results += [Conversion("g", "g.cif", counts={"tokens": 5}, removed={"crystallisation aid": 3})]
    write_report(tmp_path, results, {"g": "train"}, 1, [], [], ["train-000000.tar"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "dropped: FILE holds no chain" in shown and "200" in shown and "0f: 0f.cif" in shown and "1f.cif" not in shown
    )
    assert "N residues are" in shown and "crystallisation aid" in shown


def test_bytes_depend_on_nothing_but_the_input(folder, tmp_path):
    prepare(folder, tmp_path / "one", "--shard-size", "0.000001")
    prepare(folder, tmp_path / "two", "--workers", "2", "--shard-size", "0.000001")
    paths = sorted((tmp_path / "one").glob("*"))
    assert [path.name for path in paths if path.suffix == ".tar"] == ["train-000000.tar", "train-000001.tar"]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_samples(folder, tmp_path):
    prepare(folder, tmp_path / "out", "--shard-size", "0.000001")
    read = list(wds.WebDataset(str(tmp_path / "out" / "train-000001.tar"), shardshuffle=False))
    assert {"__key__", "json", "structure.npz", "msa.npz"} <= set(read[0])
    entry = open_shards([str(tmp_path / "out" / "*.tar")])[1]
    assert entry.key == read[0]["__key__"] == "tiny"
    assert (entry.tokens, entry.resolution, entry.release_date, entry.msa_rows) == (6, 3.25, None, 2)
    assert entry.chains == [{"type": "protein", "entity": 0, "length": 6, "observed": 4, "cluster": "protein:again_xA"}]
    structure, alignments, _ = read_sample(entry)
    assert len(structure) == 6 and list(alignments) == [0]
    assert structure.meta["chains"][0]["cluster"] == "protein:again_xA" and structure.meta["id"] == "tiny"
    expected = [GAP, *(TOKEN_IDS[name] for name in ("MET", "GLY", "SER", "ALA")), GAP]
    assert alignments[0].tokens[1].tolist() == expected
    index_path(tmp_path / "out" / "train-000001.tar").unlink()
    assert open_shards([str(tmp_path / "out" / "*.tar")])[1] == entry


def test_alignments_by_table(folder, tmp_path):
    entries, _ = folder
    (tmp_path / "map.tsv").write_text("entry\tchain\tpath\nAGAIN\tA\tmsas/tiny_xA_good.a3m\n")
    options = ["--msa-map", str(tmp_path / "map.tsv"), "--min-residues", "4", "--workers", "1", "--only", "again"]
    assert main(["prepare", str(entries), str(tmp_path / "out"), *options]) == 0
    assert report_of(tmp_path / "out")[1]["again"]["msa_depth"] == {"0": 2}


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    """What was finished is not converted again, unless its input or the options changed; the bytes are the same."""
    prepare(folder, tmp_path / "whole")
    out, seen, real = tmp_path / "out", [], work.convert

    def interrupted(job, options):
        seen.append(job.source.key)
        if job.source.key == stop:
            raise KeyboardInterrupt
        return real(job, options)

    monkeypatch.setattr(work, "convert", interrupted)
    stop = "tiny"
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, out)
    assert seen == ["again", "broken", "tiny"] and not list(out.glob("*.tar"))
    os.utime(folder[0] / "broken.cif", (1, 1))
    stop = None
    seen.clear()
    assert prepare(folder, out) == 0
    assert seen == ["broken", "tiny", "wet"]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    seen.clear()
    assert prepare(folder, out, "--overwrite", "--min-residues", "5") == 0
    assert seen == ["again", "broken", "tiny", "wet"]


def test_a_worker_that_dies(folder, tmp_path, monkeypatch, capsys):
    real = work.convert
    monkeypatch.setattr(
        work, "convert", lambda job, options: os._exit(9) if "tiny" in job.source.key else real(job, options)
    )
    assert prepare(folder, tmp_path / "out", "--workers", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "tiny" in error
    assert prepare(folder, tmp_path / "out", "--workers", "2", "--skip", "tiny") == 0
    assert set(report_of(tmp_path / "out")[1]) == {"again", "broken", "wet"}


def test_an_unforeseen_entry_is_dropped(folder, tmp_path, monkeypatch):
    from cpfold_train.data.prepare import convert

    def read(path, assembly):
        if path.stem == "again":
            raise ZeroDivisionError("odd")
        return read_structure(path, assembly)

    monkeypatch.setattr(convert, "read_structure", read)
    prepare(folder, tmp_path / "out")
    _, entries = report_of(tmp_path / "out")
    assert entries["again"]["dropped"] == "again.cif cannot be prepared: ZeroDivisionError: odd"
    assert "dropped" not in entries["tiny"]


def test_a_name_too_long_for_a_tar_is_dropped(folder, tmp_path):
    write_tiny(folder[0] / f"{'a' * 90}.cif")
    prepare(folder, tmp_path / "out")
    _, entries = report_of(tmp_path / "out")
    assert "80" in entries["a" * 90]["dropped"]
    assert "dropped" not in entries["tiny"]


def test_nothing_is_kept(folder, tmp_path, capsys):
    assert prepare(folder, tmp_path / "out", "--only", "broken,wet") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert report_of(tmp_path / "out")[0]["dropped"] == 2


def test_shards_are_replaced_only_on_request(folder, tmp_path, capsys):
    """And then none of the earlier ones stays behind."""
    out = tmp_path / "out"
    prepare(folder, out, "--shard-size", "0.000001")
    assert prepare(folder, out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert prepare(folder, out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.json",
        "report.png",
        "train-000000.index.npz",
        "train-000000.tar",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere", "out"], "nowhere "),
        (["{msas}", "out"], ".cif, .mmcif, .bcif, .pdb, .ent"),
        (["{msas}/other_A_x.a3m", "out"], "other_A_x.a3m"),
        (["{entries}", "{entries}/sub/tiny.cif", "out"], "sample tiny"),
        (["{entries}", "out", "--val", "9xyz"], "9xyz"),
        (["{entries}", "out", "--only", "9xyz"], "9xyz"),
        (["{entries}", "out", "--msa", "nowhere"], "--msa nowhere"),
        (["{entries}", "out", "--msa-map", "nowhere"], "--msa-map nowhere"),
        (["{entries}", "out", "--msa-map", "{msas}/map.tsv"], "map.tsv line 2"),
        (["{entries}", "out", "--workers", "0"], "--workers"),
        (["{entries}", "out", "--before", "2021"], "--before 2021-09-30"),
        (["{entries}", "out", "--val-fraction", "5"], "--val-fraction 5"),
        (["{entries}", "out", "--val-fraction", ".5", "--val-after", "2020-01-01"], "--val-after"),
        (["4hhb", "out"], "--download DIR"),
    ],
)
def test_it_says_what_to_type(folder, tmp_path, options, sentence, capsys, monkeypatch):
    entries, msas = folder
    (entries / "sub").mkdir()
    (msas / "map.tsv").write_text("tiny\tA\tother_A_x.a3m\ntiny\tA\n")
    if "sub" in options[1]:
        write_tiny(tmp_path / "tiny.cif")
        options = [options[0], str(tmp_path / "tiny.cif"), *options[2:]]
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *(option.format(entries=entries, msas=msas) for option in options)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


def test_workers_end_with_their_parent():
    """Even where it is killed, and a worker waits for work that will not come."""
    script = (
        "import time\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from cpfold_train.data.prepare.work import start_worker\n"
        "pool = ProcessPoolExecutor(3, initializer=start_worker)\n"
        "futures = [pool.submit(time.sleep, 0.01) for _ in range(9)]\n"
        "[f.result() for f in futures]\nprint('ready', flush=True)\ntime.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        workers = psutil.Process(parent.pid).children()
        parent.kill()
    assert len(workers) == 3
    assert not psutil.wait_procs(workers, timeout=20)[1]
