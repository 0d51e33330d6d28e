"""The one list of what a run measures: every name, its unit, what it means and where it is shown.

``metrics.csv``, the progress bar, validation, early stopping, ``result.json``, the plots, ``compare`` and Weights &
Biases read it, and ``docs/metrics.md`` is made from it. A new metric is a row here and the line that measures it.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One column of ``metrics.csv``, which W&B gets under the same name.

    Attributes:
        doc: what it is.
        unit: of the value; empty for plain numbers.
        better: ``min`` or ``max``, which of two values is the better one; empty where neither is.
        bar: its name in the progress bar; empty where it is not shown there.
        chart: title of the chart of ``pictures/loss.png`` that shows it.
        compared: whether ``compare --plot`` draws it.
        summarised: whether the table at the end of a run has it.
        needs: ``structures`` (``diffusion.validation_steps`` above 0) or ``confidence`` (these, and a confidence module
            that is trained) for a metric of validation that is not there without them.
    """

    doc: str
    unit: str = ""
    better: str = ""
    bar: str = ""
    chart: str = ""
    compared: bool = False
    summarised: bool = False
    needs: str = ""


METRICS = {
    "train/loss": Metric(
        "weighted sum of the losses below: over the ranks that share a sample, mean over samples",
        better="min",
        bar="loss",
        chart="loss",
        compared=True,
        summarised=True,
    ),
    "train/diffusion": Metric("squared error of the denoised atoms, not weighted", better="min", summarised=True),
    "train/smooth_lddt": Metric("smooth lDDT loss of the denoised atoms, not weighted", better="min"),
    "train/distogram": Metric(
        "cross entropy of the distogram, not weighted", better="min", compared=True, summarised=True
    ),
    "train/bfactor": Metric("cross entropy of the B-factor bins, not weighted", better="min"),
    "train/plddt": Metric("cross entropy of the predicted lDDT, not weighted", better="min"),
    "train/resolved": Metric("cross entropy of which atoms are resolved, not weighted", better="min"),
    "train/pde": Metric("cross entropy of the predicted distance errors, not weighted", better="min"),
    "train/pae": Metric("cross entropy of the predicted aligned errors, not weighted", better="min"),
    "lr": Metric("learning rate of the step, of a weight whose factor is 1"),
    "grad_norm": Metric("norm of the gradient before clipping"),
    "tokens": Metric("tokens of the step, of all replicas", bar="tokens"),
    "crop_size": Metric("most tokens that a sample of the step may have"),
    "step_s": Metric("time of the step without waiting for data, mean over ranks", "s", "min", bar="s/step"),
    "data_wait_s": Metric("wait for data in the step, of the rank that waited longest", "s", "min", bar="data_s"),
    "quarantined": Metric("samples that could not be used, since the start"),
    "skipped": Metric("steps that were skipped, since the start"),
    "peak_memory_mib": Metric("peak memory since the start, of the rank with the highest", "MiB", "min", bar="MiB"),
    "sent_mib": Metric("sent to other ranks in the step, mean over ranks", "MiB", "min"),
    "exposed_comm_s": Metric("wait for messages in the step, mean over ranks", "s", "min", bar="comm_s"),
    "tokens_per_s": Metric("tokens by step_s and number of ranks", "1/s", "max", bar="tok/s"),
    "tflops": Metric("model FLOPs by step_s and number of ranks, in 10^12", "TFLOP/s", "max"),
    "mfu": Metric("tflops by the peak of the GPU; not on CPU", better="max", bar="mfu"),
    "val/loss": Metric(
        "weighted sum of the losses, mean over samples", better="min", chart="loss", compared=True, summarised=True
    ),
    "val/distogram": Metric(
        "cross entropy of the distogram, not weighted", better="min", compared=True, summarised=True
    ),
    "val/contact_precision": Metric(
        "fraction of true contacts among the L likeliest long-range ones of the distogram",
        better="max",
        chart="scores",
        compared=True,
        summarised=True,
    ),
    "val/distance_lddt": Metric(
        "lDDT of the distances that the distogram expects",
        better="max",
        chart="scores",
        compared=True,
        summarised=True,
    ),
    "val/structure_lddt": Metric(
        "lDDT of the representative atoms of a sampled structure",
        better="max",
        compared=True,
        summarised=True,
        needs="structures",
    ),
    "val/plddt": Metric("as train/plddt", better="min", summarised=True, needs="confidence"),
    "val/resolved": Metric("as train/resolved", better="min", summarised=True, needs="confidence"),
    "val/pde": Metric("as train/pde", better="min", summarised=True, needs="confidence"),
    "val/pae": Metric("as train/pae", better="min", summarised=True, needs="confidence"),
}
"""In the order of the columns."""

COLUMNS = ("step", *METRICS)
"""Of ``metrics.csv``."""
VALIDATION = tuple(name for name in METRICS if name.startswith("val/"))
"""What a validation measures, and early stopping may monitor."""

COMMUNICATION = {
    "sent_mib": Metric("sent by rank 0 since the start", "MiB", "min"),
    "exposed_s": Metric("wait of rank 0 since the start", "s", "min"),
}
"""Of each op, for W&B alone, as ``comm/OP/NAME``."""

MODULES = {
    "gradient_norm": Metric("norm of the gradient before clipping"),
    "weight_norm": Metric("norm of the weights"),
    "update_ratio": Metric("norm of Adam's step, without weight decay, by weight_norm; 0 in a step that was skipped"),
    "non_finite": Metric("first weight whose gradient is not finite; not sent to W&B"),
}
"""Of each top-level module, in ``modules.csv`` and as W&B's ``modules/MODULE/NAME``."""

PER_RANK = {
    "peak_memory_mib": Metric("peak memory", "MiB", "min"),
    "peak_memory_above_baseline_mib": Metric("peak memory above that before the first step", "MiB", "min"),
    "sent_mib": Metric("sent to other ranks", "MiB", "min"),
    "exposed_comm_s": Metric("wait for messages", "s", "min"),
    "data_wait_s": Metric("wait for data", "s", "min"),
    "data_wait_share": Metric("data_wait_s by the sum of itself and the time of all steps", "", "min"),
}
"""Lists of ``result.json`` with a number for each rank, over the whole run."""

RESULT = {
    "status": Metric("completed, interrupted or failed"),
    "error": Metric("what ended the run, unless it was completed"),
    "steps": Metric("optimizer steps so far"),
    "train/loss": Metric("of the last step that was not skipped", better="min"),
    "last_losses": Metric("train/loss of up to ten such steps"),
    **{name: Metric("of the last validation", better=METRICS[name].better) for name in VALIDATION},
    "seconds": Metric("from the start to the end", "s"),
    "grid": Metric("ROWSxCOLUMNS of ranks"),
    "kernels": Metric("the kernels that were chosen"),
    "dp": Metric("replicas"),
    "world_size": Metric("ranks of all replicas"),
    "seed": Metric("of the run"),
    "quarantined": METRICS["quarantined"],
    "skipped": METRICS["skipped"],
    "left_out": Metric("crops of the last validation that had no pair to score, by metric"),
    **PER_RANK,
}
"""Keys of ``result.json``; those that have no value yet are left out."""


def progress_bar(row: dict[str, float]) -> dict[str, float]:
    """What the progress bar shows of the metrics of a step."""
    return {metric.bar: float(row[name]) for name, metric in METRICS.items() if metric.bar and name in row}


def charts() -> dict[str, list[str]]:
    """Names of the metrics of each chart of ``pictures/loss.png``, by its title."""
    found: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.chart:
            found.setdefault(metric.chart, []).append(name)
    return found


def measured(sampled: bool, trains_confidence: bool) -> list[str]:
    """The metrics that validation has, in the order of :data:`VALIDATION`.

    Args:
        sampled: whether it samples structures.
        trains_confidence: whether the confidence module is trained.
    """
    has = {"": True, "structures": sampled, "confidence": sampled and trains_confidence}
    return [name for name in VALIDATION if has[METRICS[name].needs]]


def page() -> str:
    """``docs/metrics.md``."""
    parts = [
        "# Metrics",
        "Made from `cpfold_train/reports/metrics.py` by `python docs/write_pages.py`. An arrow says which values are "
        "better, *bar* is the name in the progress bar.",
        "## metrics.csv",
        "A row every `trainer.log_every_n_steps` optimizer steps, after `step`, their number. W&B has them under the "
        "same names. A cell is empty where there was nothing to measure.",
        _table(METRICS, bar=True),
        "`val/structure_lddt` needs sampled structures (`diffusion.validation_steps` above 0), and the last four need "
        "also a confidence module that is trained.",
        "## Communication by op",
        "In W&B alone, as `comm/OP/NAME`.",
        _table(COMMUNICATION),
        "## modules.csv",
        "A row for each top-level module every `module_statistics.every_n_steps` optimizer steps, after `step` and "
        "`module`; in W&B as `modules/MODULE/NAME`.",
        _table(MODULES),
        "## result.json",
        "Written when a run ends, whether well or not. "
        + ", ".join(f"`{name}`" for name in PER_RANK)
        + " are lists with a number for each rank, over the whole run.",
        _table(RESULT),
    ]
    return "\n\n".join(parts) + "\n"


def _table(metrics: dict[str, Metric], bar: bool = False) -> str:
    arrows = {"min": "↓", "max": "↑", "": ""}
    head = ("name", "unit", "better", *["bar"] * bar, "meaning")
    rows = [
        (f"`{name}`", metric.unit, arrows[metric.better], *[metric.bar] * bar, metric.doc)
        for name, metric in metrics.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
