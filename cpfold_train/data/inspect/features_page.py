"""The page ``docs/features.md``, from the schema; ``python docs/write_pages.py`` writes it."""

from __future__ import annotations

from cpfold_train.data.schema import FEATURES

_HEAD = """\
# Features of a batch

Made from `cpfold_train/data/schema.py`, where a feature is added, by `python docs/write_pages.py`. Each has the batch
dim first, which is not shown. Sizes are padded so that the grid divides them; `token+1` is one more than the number of
tokens, `sequence` is a row of the MSA, `copy` a copy of a chain, `order` an order of a residue's equivalent atoms.
Makers are functions of `cpfold_train/data/`. Padding is zero unless the page says otherwise.

| placement | what a rank of an R x C grid holds |
| --- | --- |
| tile | 1/R of the first dim, 1/C of the second |
| atoms | 1/(R C) of the first dim |
| replicated | all of it |
| plain | all of it, as a plain tensor instead of a DTensor |
| host | all of it, as an array that stays on the host |

Beside them a batch has `id`, the names of its samples, and from the loader `filler`, which samples a mean must not
count, and `crop_size`.
"""


def features_page() -> str:
    """The page's text."""
    lines = [
        _HEAD,
        "| feature | dtype | dims | placement | what it is | made by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, feature in FEATURES.items():
        doc = feature.doc if feature.pad == 0 else f"{feature.doc}; padding: {feature.pad}"
        cells = (f"`{name}`", feature.dtype, feature.dims, feature.placement, doc, f"`{feature.maker}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
