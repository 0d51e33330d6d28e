"""What the commands do, for scripts and notebooks: functions that return objects with the metrics.

    from cpfold_train import api

    run = api.train("crop_size=64", "cp.grid=1x2", run_dir="runs/mine")
    run.result["val/loss"], run.metrics("train/loss"), run.checkpoint

Settings are written as on the command line of ``train.py``, and options are those of each command, with underscores.
What takes ranks or workers (:func:`train`, :func:`resume`, :func:`predict`, :func:`prepare`) runs in processes of its
own, whose output is printed as it comes; everything else is computed here. Nothing differs from the commands but the
way the results arrive.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfold_train.cli.evaluate import summaries
from cpfold_train.cli.resume import keys as resume_keys
from cpfold_train.config.check import check
from cpfold_train.config.compose import compose_run, read_request
from cpfold_train.config.quoting import hydra_quoted
from cpfold_train.config.schema import TrainConfig
from cpfold_train.data.inputs.inputs import find_queries
from cpfold_train.data.stream.shards import StoredSample, open_shards
from cpfold_train.errors import ConfigError, RunError
from cpfold_train.evaluate.differences import Change, changes
from cpfold_train.evaluate.predictions import Row, find_predictions, score_all
from cpfold_train.paths import train_command
from cpfold_train.reports.metrics_csv import read_metrics
from cpfold_train.reports.result_file import read_result

if TYPE_CHECKING:
    from cpfold_train.plan.plan import Plan

PathLike = str | Path
_ERROR = re.compile(r"(?:^|^usage.*|^\S+ .*: )error: (.*)")
"""A line that says what is wrong: a command's own, or that of its options."""


@dataclass(frozen=True)
class Run:
    """A run's directory and what is in it, also while the run goes.

    Attributes:
        dir: the run directory.
    """

    dir: Path

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``: status, steps, last losses and validation, memory and communication of each rank."""
        return read_result(self.dir)

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.dir / "checkpoints" / "last.ckpt"

    @property
    def columns(self) -> list[str]:
        """Names of the metrics that the run has: see docs/metrics.md."""
        rows = read_metrics(self.dir / "metrics.csv")
        return [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]

    def metrics(self, name: str) -> dict[int, float]:
        """The values of a metric, such as ``train/loss`` or ``val/loss``, by optimizer step.

        Raises:
            ConfigError: the run has no such metric.
        """
        if name not in self.columns:
            raise ConfigError(f"{self.dir} has no metric {name}: it has {', '.join(self.columns) or 'none yet'}")
        rows = read_metrics(self.dir / "metrics.csv")
        return {int(row["step"]): float(row[name]) for row in rows if row[name]}


@dataclass(frozen=True)
class Prediction:
    """The predicted structures of one input.

    Attributes:
        id: of the input.
        files: mmCIF files, the most confident first.
        scores: of each file: ``confidence_score``, ``ptm``, ``iptm`` and others.
        picture: of the most confident one.
    """

    id: str
    files: list[Path]
    scores: list[dict[str, Any]]
    picture: Path


@dataclass(frozen=True)
class Evaluation:
    """Scores of predicted structures.

    Attributes:
        rows: a sample each, with its scores by interface and ligand, too.
        means: of each score, over all samples, the most confident one of each entry, and the best by lDDT.
        problems: what could not be scored, and why.
    """

    rows: list[Row]
    means: dict[str, dict[str, float | None]]
    problems: list[str]


def compose(*settings: str) -> TrainConfig:
    """The checked configuration of ``python train.py SETTINGS``.

    Args:
        settings: ``KEY=VALUE``, such as ``recipe=large_crop`` or ``cp.grid=2x2``.

    Raises:
        ConfigError: there is no such key, or the run could not work.
    """
    config = compose_run(list(settings))
    # ``last`` is resolved in the run directory, which there is none of yet.
    check(replace(config, ckpt_path=None) if config.ckpt_path == "last" else config)
    return config


def prepare(inputs: PathLike | Sequence[PathLike], out: PathLike, **options: Any) -> list[StoredSample]:
    """Turn structure files and alignments into shards, as ``cpfold-train prepare``.

    Args:
        inputs: files, folders, lists or PDB ids.
        out: folder for the shards.
        options: of the command, such as ``msa="alignments"`` or ``val="4dme,3u8v"``.

    Returns:
        The samples of the shards, with their tokens, chains and rows of alignments.

    Raises:
        ConfigError: an option or path cannot work.
        RunError: the command failed.
    """
    given = [inputs] if isinstance(inputs, (str, Path)) else inputs
    _command("prepare", *given, out, *_typed(options))
    return samples(out)


def samples(shards: PathLike) -> list[StoredSample]:
    """The samples of a ``.tar`` file, of a folder of them, or of a glob.

    Raises:
        ConfigError: there are none.
    """
    return open_shards([f"{shards}/*.tar" if Path(shards).is_dir() else str(shards)])


def train(*settings: str, run_dir: PathLike | None = None) -> Run:
    """Train, as ``python train.py SETTINGS``, on ranks that are processes of their own.

    Args:
        settings: ``KEY=VALUE``.
        run_dir: of the run; by default a new one, ``runs/DATE/TIME``.

    Raises:
        ConfigError: the settings cannot work.
        RunError: the run failed, with the reason.
        KeyboardInterrupt: it was interrupted, and has saved a checkpoint.
    """
    run_dir = _new_run_dir() if run_dir is None else Path(run_dir)
    _stream([*train_command(), *settings, f"hydra.run.dir={hydra_quoted(run_dir)}"])
    return Run(run_dir)


def resume(run: Run | PathLike, *settings: str, fork: PathLike | None = None) -> Run:
    """Go on with a run from its newest complete checkpoint, as ``cpfold-train resume``.

    Args:
        run: the run, or its directory.
        settings: what is to have other values than in the run, such as ``trainer.max_steps=300``.
        fork: leave the run as it is, and go on in this new directory.

    Raises:
        ConfigError: there is nothing to go on from, or the settings cannot work.
        RunError: the run failed, with the reason.
        KeyboardInterrupt: it was interrupted, and has saved a checkpoint.
    """
    run_dir = run.dir if isinstance(run, Run) else Path(run)
    _stream([*train_command(), *resume_keys(run_dir, None if fork is None else str(fork)), *settings])
    return Run(run_dir if fork is None else Path(fork))


def plan(*settings: str) -> Plan:
    """Memory, communication and time of a step on one rank of ``cp.grid``, as ``cpfold-train plan``.

    Args:
        settings: those of the run, with ``cp.grid``; ``device=NAME`` (default: h100-80gb).

    Raises:
        ConfigError: the settings cannot be planned, or have no grid.
    """
    from cpfold_train.plan.propose import plan_run

    request = read_request(list(settings))
    if request.grid is None:
        raise ConfigError("a plan is of one grid: type cp.grid=2x2, for example, or ask api.propose for grids")
    return plan_run(request.config, request.grid, request.device, request.choose)


def propose(*settings: str) -> list[Plan]:
    """Plans of the grids on up to ``gpus=N`` GPUs that fit, fastest first, as ``cpfold-train plan`` without a grid.

    Args:
        settings: those of the run, ``gpus=N`` and ``device=NAME``.

    Raises:
        ConfigError: the settings cannot be planned.
    """
    from cpfold_train.plan.propose import propose as propose_grids

    request = read_request([*settings, "cp.grid=auto"])
    return propose_grids(request.config, request.device, request.gpus, request.dp, request.choose)


def predict(
    checkpoint: PathLike, inputs: PathLike | Sequence[PathLike], out: PathLike, **options: Any
) -> list[Prediction]:
    """Sample structures, as ``cpfold-train predict``.

    Args:
        checkpoint: that training wrote.
        inputs: shards, structure files, FASTA, YAML, or folders of these.
        out: receives a folder for each input.
        options: of the command, such as ``samples=5``, ``grid="1x2"`` or ``id=["4hhb"]``.

    Returns:
        The predictions of these inputs, those that were there already included.

    Raises:
        ConfigError: an option or path cannot work, or an input cannot be read.
        RunError: the command failed.
    """
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    _command("predict", checkpoint, *given, "--out", out, *_typed(options))
    msa, ids = options.get("msa"), options.get("id", [])
    ids = [ids] if isinstance(ids, str) else list(ids)
    queries = find_queries(list(map(str, given)), msa and Path(msa), ids)
    return [_prediction(Path(out) / query.id, query.id) for query in queries]


def evaluate(predictions: PathLike, *truth: PathLike) -> Evaluation:
    """Score predicted structures against the truth, as ``cpfold-train evaluate``.

    Args:
        predictions: what :func:`predict` wrote, or a structure file, or a folder.
        truth: shards, structure files, or folders of these, with the same ids.

    Raises:
        ConfigError: there is nothing to score.
    """
    truths = {query.id: query for query in find_queries(list(map(str, truth)))}
    rows, problems = score_all(find_predictions(Path(predictions)), truths)
    if not rows:
        raise ConfigError(f"nothing in {predictions} could be scored: {'; '.join(problems) or 'ids must agree'}")
    return Evaluation(rows, summaries(rows), problems)


def compare_predictions(before: Evaluation, after: Evaluation) -> list[Change]:
    """Each score of each entry, interface and ligand, before and after, as ``cpfold-train evaluate BEFORE AFTER``.

    Args:
        before, after: of predictions of the same inputs.
    """
    return changes(before.rows, after.rows)


def _prediction(folder: Path, name: str) -> Prediction:
    about = json.loads((folder / f"{name}.json").read_text())
    scores = [{key: value for key, value in sample.items() if key != "file"} for sample in about["samples"]]
    files = [folder / sample["file"] for sample in about["samples"]]
    return Prediction(name, files, scores, folder / f"{name}.png")


def _new_run_dir() -> Path:
    """``runs/DATE/TIME``, or the next name where that is taken."""
    plain = Path("runs", time.strftime("%Y-%m-%d/%H-%M-%S"))
    names = itertools.chain([plain], (plain.with_name(f"{plain.name}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not path.exists())


def _typed(options: Mapping[str, Any]) -> list[str]:
    """Options as a shell has them: ``max_msa_rows=8`` is ``--max-msa-rows 8``, true a flag, a list is repeated."""
    words: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not False and value is not None:
            given = value if isinstance(value, (list, tuple)) else [value]
            words += [word for one in given for word in (option, str(one))]
    return words


def _command(name: str, *words: PathLike) -> None:
    _stream([sys.executable, "-m", "cpfold_train", name, *map(str, words)])


def _stream(command: list[str]) -> None:
    """Run a command, print what it prints, and raise what its exit code says.

    An interrupt goes to the command, which saves what it has and ends.
    """
    error = ""
    # A notebook says that its output has colors; what is drawn over itself would fill it.
    env = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    # A notebook interrupts the whole group of its kernel; the command is to get one signal, not two.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    ) as process:
        while True:
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    if found := _ERROR.search(line):
                        error = found[1].strip()
                break
            except KeyboardInterrupt:
                os.kill(process.pid, signal.SIGINT)
    code = process.returncode
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code == 2:
        raise ConfigError(error or "the command was refused: what it printed says why")
    if code:
        raise RunError(error or f"it ended with exit code {code}: what it printed says more")
