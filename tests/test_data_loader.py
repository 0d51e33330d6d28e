"""The loader: order, resume and errors."""

import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfold_train.data.schema import FEATURES
from cpfold_train.data.stream.loader import TileLoader
from cpfold_train.data.stream.sampling import Source
from cpfold_train.data.stream.transfer import pack
from cpfold_train.errors import ConfigError, DataError
from cpfold_train.parallel.grid import Grid

SHARDS = ["data/shards/train-*.tar"]


def loader(grid=None, **settings):
    settings = {"crop_size": 64, "max_msa_rows": 16, "batch_size": 2, "samples_per_epoch": 20, "seed": 5} | settings
    source = {name: settings.pop(name) for name in ("sampling", "crop") if name in settings}
    return TileLoader([Source(settings.pop("shards", SHARDS), **source)], grid or Grid(), **settings)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if name in ("id", "crop_size"):
            assert a[name] == b[name], name
        else:
            assert np.array_equal(a[name], b[name]), name


def draws(batches):
    return [pair for batch in batches for pair in zip(batch["id"], batch["sample_key"].tolist())]


def test_batch_shapes():
    grid = Grid(2, 3, 1, 4)
    batch = next(iter(loader(grid, crop_size=100, shards=["tests/data/*.tar"])))
    n, s = grid.pad_tokens(100), 16
    assert batch["res_type"].shape == (2, n, 33) and batch["token_bonds"].shape == (2, n // 2, n // 3, 1)
    assert batch["disto_target"].shape == (2, n // 2, n // 3, 1) and batch["msa"].shape == (2, s // 2, n // 3)
    assert set(batch) == {*FEATURES, "id", "filler", "crop_size"} and batch["num_tokens"].tolist() == [
        100,
        100,
    ]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_change_nothing(start_method):
    serial = list(loader())
    parallel = list(loader(num_workers=2, start_method=start_method))
    assert len(serial) == len(parallel) == 10
    for a, b in zip(serial, parallel):
        same(a, b)


def test_grid_changes_nothing():
    expected = draws(loader())
    for rank in range(6):
        assert draws(loader(Grid(2, 3, 1, rank))) == expected


def test_every_sample_once_and_keys_are_unique():
    one_pass = draws(loader(samples_per_epoch=None, batch_size=3))
    assert len({key for key, _ in one_pass}) == len(one_pass) == 9
    many = draws(loader(samples_per_epoch=60))
    assert len({draw for _, draw in many}) == 60


def test_replicas_share_out_the_samples():
    parts = [draws(loader(Grid(1, 1, 3, rank), samples_per_epoch=None, batch_size=1)) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert len({key for part in parts for key, _ in part}) == 9
    serial = draws(loader(samples_per_epoch=None, batch_size=1))
    assert [draw for turn in zip(*parts) for draw in turn] == serial
    same_replica = [draws(loader(Grid(1, 2, 2, rank))) for rank in range(4)]
    assert same_replica[0] == same_replica[1] != same_replica[2] == same_replica[3]


def test_tail_is_filled_up():
    """9 samples over 2 replicas with batches of 2: three batches each, three draws more than there are samples."""
    loaders = [loader(Grid(1, 1, 2, rank), samples_per_epoch=None) for rank in range(2)]
    batches = [list(each) for each in loaders]
    parts = [draws(each) for each in batches]
    assert [len(each) for each in loaders] == [3, 3]
    assert sum(int(batch["filler"].sum()) for each in batches for batch in each) == 3
    assert [len(part) for part in parts] == [6, 6] and len({key for part in parts for key, _ in part}) == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_resume(workers):
    """A state taken after three batches continues with the fourth, and with the next epoch's first after the last."""
    whole = loader(num_workers=workers)
    first, second = list(whole), list(whole)
    stopped = loader(num_workers=workers)
    list(itertools.islice(iter(stopped), 3))
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    for a, b in zip(first[3:], resumed, strict=True):
        same(a, b)
    for a, b in zip(second, resumed, strict=True):
        same(a, b)


def test_resume_reads_nothing_before_its_place(tmp_path, monkeypatch):
    from cpfold_train.data.stream import loader as module

    read = []
    real = module.read_sample
    monkeypatch.setattr(module, "read_sample", lambda entry: read.append(entry.key) or real(entry))
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "position": 16, "step": 8})
    assert len(list(resumed)) == 2 and len(read) == 4


def test_epochs_follow_without_a_stop():
    """Workers live on into the next epoch, and start again only where the stream is left."""
    whole = loader(num_workers=2, samples_per_epoch=6)
    epochs = [draws(whole)]
    workers = whole._packed
    epochs += [draws(whole) for _ in range(3)]
    assert whole._packed is workers
    serial = loader(samples_per_epoch=6)
    assert epochs == [draws(serial) for _ in range(4)]
    list(itertools.islice(iter(whole), 1))
    assert whole._packed is workers
    assert draws(whole) == [draws(serial) for _ in range(2)][1]
    assert whole._packed is not workers
    assert whole.waited_s > 0


def test_workers_use_one_thread(monkeypatch):
    from cpfold_train.data.stream import loader as module

    monkeypatch.setattr(module, "collate", lambda *_: {"threads": torch.tensor([torch.get_num_threads()])})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert next(iter(loader(num_workers=1, start_method="fork")))["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def test_crop_sizes_by_optimizer_step():
    """Steps of two batches; an epoch of five batches has three. Also after a resume, and with two replicas."""
    schedule = {"crop_size": 40, "crop_schedule": {1: 50, 4: 70}, "accumulate": 2, "samples_per_epoch": 5}
    expected = [40, 40, 50, 50, 50, 50, 50, 70, 70, 70]
    for workers in (0, 2):
        scheduled = loader(batch_size=1, num_workers=workers, **schedule)
        sizes = [(batch["crop_size"], int(batch["num_tokens"].max())) for _ in range(2) for batch in scheduled]
        assert [size for size, _ in sizes] == expected
        assert all(tokens <= size for size, tokens in sizes)
    stopped = loader(batch_size=1, **schedule)
    list(stopped)
    list(itertools.islice(iter(stopped), 2))
    state = stopped.state_dict()
    assert {name: state[name] for name in ("epoch", "position", "step")} == {"epoch": 1, "position": 2, "step": 4}
    resumed = loader(batch_size=1, **schedule)
    resumed.load_state_dict(state)
    assert [batch["crop_size"] for batch in resumed] == expected[7:]
    replica = loader(Grid(1, 1, 2, 1), batch_size=1, **schedule | {"accumulate": 1})
    replica.load_state_dict(state)
    assert [batch["crop_size"] for batch in replica] == [70, 70]
    assert loader(batch_size=1, **schedule | {"crop_size": 90}).sizes == {0: 90, 1: 50, 4: 70}


def test_a_resume_counts_optimizer_steps_on():
    """Wherever it stops: each step has a size of its own, and five batches are two full steps and a half.

    Where it stops within a step, the step begins again.
    """
    schedule = {"crop_size": 40, "crop_schedule": {step: 40 + step for step in range(1, 6)}}
    schedule |= {"accumulate": 2, "samples_per_epoch": 5, "batch_size": 1}
    expected = [40, 40, 41, 41, 42, 43, 43, 44, 44, 45]
    for made in range(10):
        stopped = loader(**schedule)
        stream = itertools.chain(iter(stopped), iter(stopped))
        assert [batch["crop_size"] for batch in itertools.islice(stream, made)] == expected[:made]
        resumed = loader(**schedule)
        resumed.load_state_dict(stopped.state_dict())
        sizes = [batch["crop_size"] for batch in itertools.chain(iter(resumed), iter(resumed))]
        again = made - made % 5 % 2
        assert sizes[: 10 - again] == expected[again:]


def test_resume_with_other_replicas():
    state = loader().state_dict() | {"position": 8}
    parts = []
    for rank in range(2):
        resumed = loader(Grid(1, 1, 2, rank), batch_size=1)
        resumed.load_state_dict(state)
        parts.append(draws(resumed))
    assert [draw for turn in zip(*parts) for draw in turn] == draws(loader(batch_size=1))[8:]


def positions(loaders, monkeypatch):
    """Epoch and position of each sample that replicas make, in the order of their batches."""
    from cpfold_train.data.stream import loader as module

    made = []
    monkeypatch.setattr(module, "make_batch", lambda _, spec: made.append(spec) or (pack({"n": torch.ones(1)}), []))
    for _ in zip(*loaders, strict=True):
        pass
    return sorted((spec.epoch, position) for spec in made for position in spec.positions)


@pytest.mark.parametrize("limit", [1.0, 3])
@pytest.mark.parametrize(
    ("replicas", "batch_size", "accumulate"), [(1, 1, 1), (1, 2, 3), (2, 1, 2), (3, 2, 1), (1, 5, 4)]
)
def test_every_sample_of_the_epoch_is_shown_once(replicas, batch_size, accumulate, limit, monkeypatch):
    """Eleven samples, of which a run with steps of two batches of one has made whole steps: others go on with any
    batches, and only what fills the last batch up is of the next epoch. Steps are whole from there on."""
    common = {"samples_per_epoch": 11, "num_workers": 0}
    for made in range(12):
        stopped = loader(**common, batch_size=1, accumulate=2)
        stream = iter(stopped)
        for _ in range(made):
            next(stream)
        shown = made if made == 11 else made - made % 2
        state = stopped.state_dict()
        assert (state["epoch"], state["position"]) == ((1, 0) if made == 11 else (0, shown))
        settings = {**common, "batch_size": batch_size, "accumulate": accumulate, "limit": limit}
        resumed = [loader(Grid(1, 1, replicas, rank), **settings) for rank in range(replicas)]
        at_once, begins = replicas * batch_size, state["position"]
        end = min(11, resumed[0].batches * at_once)
        for each in resumed:
            each.load_state_dict(state)
        if begins >= end:
            assert resumed[0].epoch == 1 and resumed[0].position == 0
            assert f"no batches of the epoch are left: epoch 1 begins, and {11 - begins} of 11" in resumed[0].told
            continue
        goes_on = f"epoch 0 goes on with sample {begins + 1} of 11"
        assert resumed[0].told == (goes_on if begins else f"epoch {state['epoch']} begins")
        found = positions(resumed, monkeypatch)
        batches = -(-(end - begins) // at_once)
        assert found == [(state["epoch"], position) for position in range(begins, begins + batches * at_once)]
        steps = -(-batches // accumulate)
        after = resumed[0].state_dict()
        assert after | {"order": ""} == {
            "epoch": state["epoch"] + 1,
            "position": 0,
            "step": state["step"] + steps,
            "samples": 11,
            "order": "",
        }
        assert resumed[0].position == resumed[0].batches


@pytest.mark.parametrize(
    "other",
    [
        {"samples_per_epoch": 4},
        {"samples_per_epoch": 12},
        {"shards": ["tests/data/*.tar"]},
        {"seed": 6},
        {"sampling": "weighted"},
    ],
)
def test_other_samples_begin_the_next_epoch(other, monkeypatch):
    """What is left of the epoch is not defined by them."""
    common = {"samples_per_epoch": 9, "batch_size": 1}
    stopped = loader(**common)
    list(itertools.islice(iter(stopped), 7))
    resumed = loader(**common | other)
    resumed.load_state_dict(stopped.state_dict())
    assert "others than in the checkpoint: epoch 1 begins, and 2 of 9 samples of epoch 0 are not" in resumed.told
    samples = resumed.batches
    made = positions([resumed], monkeypatch) + positions([resumed], monkeypatch)
    assert made == [(epoch, position) for epoch in (1, 2) for position in range(samples)]
    assert resumed.state_dict()["step"] == 7 + 2 * samples


@pytest.mark.parametrize("made", [0, 4, 9])
def test_a_position_of_an_earlier_version_goes_on(made):
    """It was kept without what the samples are, and at the end of an epoch as the position after the last one."""
    common = {"samples_per_epoch": 9, "batch_size": 1}
    earlier = {"epoch": 0, "position": made, "step": made, "between_steps": True}
    resumed = loader(**common)
    resumed.load_state_dict(earlier)
    whole = loader(**common)
    assert draws(resumed) + draws(resumed) == (draws(whole) + draws(whole) + draws(whole))[made : 18 + made // 9 * 9]
    assert resumed.state_dict()["step"] == 18 + made // 9 * 9


def test_the_same_samples_elsewhere_go_on(tmp_path):
    """In other tars, under other names, in other crops."""
    for tar in sorted(Path("data/shards").glob("train-*")):
        shutil.copy(tar, tmp_path / tar.name.replace("train", "moved"))
    stopped = loader()
    list(itertools.islice(iter(stopped), 7))
    resumed = loader(shards=[str(tmp_path / "moved-*.tar")], crop_size=40, crop={"spatial": 1.0})
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.told == "epoch 0 goes on with sample 15 of 20"


def test_epochs():
    """Training draws again in each epoch, also after a pass that was left early; validation is always the same."""
    training = loader()
    epochs = [draws(itertools.islice(iter(training), 2)) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = loader()
    again.set_epoch(2)
    assert draws(itertools.islice(iter(again), 2)) == epochs[2]
    validation = loader(shuffle=False)
    assert draws(itertools.islice(iter(validation), 2)) == draws(itertools.islice(iter(validation), 2))


def test_missing_shards():
    with pytest.raises(ConfigError, match=r"nowhere/x-\*\.tar.* python -m cpfold_train prepare"):
        loader(shards=["nowhere/x-*.tar"])


def test_data_errors_survive_a_worker():
    assert str(pickle.loads(pickle.dumps(DataError("one sentence")))) == "one sentence"


def test_workers_import_nothing_heavy():
    script = "import sys, cpfold_train.data.stream.loader; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["lightning", "hydra", "biotite", "rich", "scipy", "matplotlib", "cpfold_train.model", "cpfold_train.ops"]
    result = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
