"""The results of a prediction in a folder: one folder a query.

``ID/ID_model_0.cif`` is the best sample, ``ID/ID_model_0.npz`` its confidence arrays, ``ID/ID.png`` a picture of it.
``ID/ID.json``, which is written last and says that the query is done, lists the samples with their scores.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpfold_train.data.inputs.inputs import Query, has_truth
from cpfold_train.data.stream.batch import Crop
from cpfold_train.predict.picture import draw_prediction
from cpfold_train.predict.predictor import Prediction, Settings
from cpfold_train.predict.write import write_arrays, write_structure
from cpfold_train.whole_file import whole_file

_TOLD = ("confidence_score", "complex_plddt", "ptm", "iptm")
"""Scores in the title of the picture."""


def is_done(out: Path, name: str) -> bool:
    """Whether the results of a query are complete: what is written last is there, and all that it lists."""
    folder = out / name
    try:
        files = [sample["file"] for sample in json.loads((folder / f"{name}.json").read_text())["samples"]]
        return bool(files) and all((folder / file).stat().st_size for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class PredictionFolder:
    """Writes what the first rank receives.

    Args:
        out: the folder.
        settings: which are noted beside the scores.

    Attributes:
        failures: reason by id of the queries that could not be used.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self._out, self._settings = out, settings
        self._samples: list[dict[str, Any]] = []
        self._best: Prediction | None = None
        self.failures: dict[str, str] = {}

    def write(self, query: Query, crop: Crop, rank: int, prediction: Prediction) -> None:
        """Structure and arrays of one sample; those of an earlier run go first."""
        folder = self._out / query.id
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for old in (folder / f"{query.id}.json", *folder.glob(f"{query.id}_model_*")):
                old.unlink(missing_ok=True)
            self._samples, self._best = [], prediction
        path = folder / f"{query.id}_model_{rank}.cif"
        title = f"{query.id}, predicted, sample {rank} of {self._settings.samples}"
        plddt = prediction.arrays.get("plddt")
        write_structure(path, crop.structure, crop.tokens, crop.atoms, prediction.coords, plddt, title)
        if prediction.arrays:
            write_arrays(path.with_suffix(".npz"), prediction.arrays)
        self._samples.append({"file": path.name, **prediction.scores})

    def finish(self, query: Query, crop: Crop) -> None:
        """The picture of the best sample, and the scores of all."""
        folder = self._out / query.id
        size = {"tokens": len(crop.tokens), "atoms": len(crop.atoms.atom)}
        told = [query.id, f"{size['tokens']:,} tokens"]
        best = self._best
        told += [f"{name.replace('_', ' ')} {best.scores[name]:.2f}" for name in _TOLD if name in best.scores]
        draw_prediction(folder / f"{query.id}.png", crop, best.coords, best.arrays, ", ".join(told))
        about = {
            "id": query.id,
            "source": query.source,
            **size,
            "truth_known": has_truth(crop.structure),
            "settings": asdict(self._settings),
            "samples": self._samples,
        }
        with whole_file(folder / f"{query.id}.json") as file:
            file.write(json.dumps(about, indent=1) + "\n")

    def fail(self, query: Query, reason: str) -> None:
        """Note a query that cannot be used."""
        self.failures[query.id] = reason
