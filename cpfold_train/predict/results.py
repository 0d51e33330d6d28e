"""The results of a prediction in a folder: one folder a query.

``ID/ID_model_0.cif`` is the best sample, ``ID/ID_model_0.npz`` its confidence arrays, ``ID/ID.png`` a picture of it.
``ID/ID.json``, which is written last and says that the query is done, lists the samples with their scores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cpfold_train.checkpoints.load import Weights
from cpfold_train.data.inputs.inputs import Query, has_truth
from cpfold_train.data.stream.batch import Crop
from cpfold_train.predict.picture import draw_prediction
from cpfold_train.predict.predictor import Prediction, Settings
from cpfold_train.predict.write import write_arrays, write_structure
from cpfold_train.tables import make_table
from cpfold_train.whole_file import whole_file

_TOLD = {"confidence_score": "confidence", "complex_plddt": "pLDDT", "ptm": "pTM", "iptm": "ipTM"}
"""Scores in the title of the picture and in the table, with the header of each."""


@dataclass(frozen=True)
class Origin:
    """What predictions are made with.

    Attributes:
        weights: and the checkpoint that has them.
        settings: how is sampled.
        precision: of the model.
        grid: which does not change what is predicted.
    """

    weights: Weights
    settings: Settings
    precision: str
    grid: str

    def __str__(self) -> str:
        return f"{self.weights}, grid {self.grid}"

    def as_json(self) -> dict[str, Any]:
        """As it stands beside the scores."""
        return {
            "checkpoint": asdict(self.weights),
            "precision": self.precision,
            "grid": self.grid,
            "settings": asdict(self.settings),
        }

    def difference(self, about: dict[str, Any]) -> str | None:
        """In words, what of a prediction that is there was made otherwise; None where it need not be made again.

        One that was made whole stays where only a crop is asked for: ``--crop`` is for what finds no memory.
        """
        there, wanted = about.get("checkpoint"), self.as_json()
        if there is None:
            return "of a checkpoint that it does not name"
        if (there["fingerprint"], there["weights"]) != (self.weights.fingerprint, self.weights.weights):
            return f"of {Weights(**there)}"
        made = about["settings"] | {"precision": about["precision"]}
        asked = wanted["settings"] | {"precision": self.precision}
        if made["crop_size"] is None:
            asked["crop_size"] = None
        options = {"crop_size": "crop"}
        other = [name for name, value in asked.items() if made.get(name) != value]
        told = (f"--{options.get(name, name).replace('_', '-')} {made.get(name)}" for name in other)
        return f"with {' '.join(told)}" if other else None


def completed(out: Path, name: str) -> dict[str, Any] | None:
    """What is told of the results of a query, if they are complete: what is written last is there, and all that it
    lists."""
    folder = out / name
    try:
        about = json.loads((folder / f"{name}.json").read_text())
        files = [sample["file"] for sample in about["samples"]]
        return about if files and all((folder / file).stat().st_size for file in files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class PredictionFolder:
    """Writes what the first rank receives.

    Args:
        out: the folder.
        origin: which is noted beside the scores.

    Attributes:
        rows: id, tokens and scores of the best sample of each query that was predicted.
        failures: reason by id of the queries that could not be used.
    """

    def __init__(self, out: Path, origin: Origin) -> None:
        self._out, self._origin = out, origin
        self._samples: list[dict[str, Any]] = []
        self._best: Prediction | None = None
        self.rows: list[tuple[str, int, dict[str, Any]]] = []
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
        title = f"{query.id}, predicted, sample {rank} of {self._origin.settings.samples}"
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
            **self._origin.as_json(),
            "samples": self._samples,
        }
        with whole_file(folder / f"{query.id}.json") as file:
            file.write(json.dumps(about, indent=1) + "\n")
        self.rows.append((query.id, size["tokens"], best.scores))

    def table(self) -> Table:
        """A row for each query that was predicted, with the scores of its best sample."""
        table = make_table(", ".join(("id", "tokens", *_TOLD.values())), text="id", title=escape(str(self._origin)))
        for name, tokens, scores in self.rows:
            table.add_row(name, f"{tokens:,}", *(f"{scores[key]:.3f}" if key in scores else "" for key in _TOLD))
        return table

    def fail(self, query: Query, reason: str) -> None:
        """Note a query that cannot be used."""
        self.failures[query.id] = reason
