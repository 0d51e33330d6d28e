"""The prediction under Lightning: each rank makes its part of each query, and the first one collects and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import Dataset

from cpfold_train.data.inputs.complex import crop_of
from cpfold_train.data.inputs.inputs import Query
from cpfold_train.data.schema import ON_HOST
from cpfold_train.data.stream.batch import Crop, collate
from cpfold_train.data.stream.padding import GPU_MULTIPLE, Padding
from cpfold_train.errors import DataError
from cpfold_train.parallel.context import Axis, ContextParallel
from cpfold_train.parallel.gather import gather_tensor, gather_to_first
from cpfold_train.parallel.grid import join_tiles
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.vocabulary import CORRECTED

RANKING = "confidence_score"
"""Figure of a sample that ranks the samples, if the model gives it."""


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
        samples: structures of each query.
        sampling_steps: of the diffusion.
        recycling_steps: of the trunk.
        max_msa_rows: most rows of the MSA.
        crop_size: most tokens, None for no limit.
        seed: of everything random.
        features: one of :data:`~cpfold_train.vocabulary.FEATURE_SETS`.
    """

    samples: int
    sampling_steps: int
    recycling_steps: int
    max_msa_rows: int
    crop_size: int | None
    seed: int
    features: str = CORRECTED


@dataclass(frozen=True)
class Prediction:
    """One sampled structure of a query of n tokens and A atoms, whole.

    Attributes:
        coords: (A, 3) float32 in Angstrom.
        scores: the model's confidence scores of the sample; ``pair_chains_iptm`` is a matrix, chain by chain.
        arrays: ``plddt`` (n,) in 0-1, ``pae`` and ``pde`` (n, n) in Angstrom, where the model gives them.
    """

    coords: np.ndarray
    scores: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Writer(Protocol):
    """Receives the samples of a query, on the first rank only."""

    def write(self, query: Query, crop: Crop, rank: int, prediction: Prediction) -> None:
        """A sample; ``rank`` counts from the best."""

    def finish(self, query: Query, crop: Crop) -> None:
        """After all samples."""

    def fail(self, query: Query, reason: str) -> None:
        """The query cannot be used."""


class PreparedQuery:
    """What a rank has of a query. Of a type of its own, into which Lightning does not look for tensors.

    Attributes:
        query: the query.
        crop: what is predicted of it; None if it cannot be used.
        feats: this rank's tiles.
        reason: why it cannot be used.
    """

    def __init__(self, query: Query, crop: Crop | None, feats: dict[str, Any], reason: str = "") -> None:
        self.query, self.crop, self.feats, self.reason = query, crop, feats, reason


class Queries(Dataset):
    """This rank's tiles of each query.

    Args:
        strategy: with a ``grid``, which knows the rank once it has started.
    """

    def __init__(self, queries: list[Query], strategy: Strategy, settings: Settings) -> None:
        self._queries, self._strategy, self._settings = queries, strategy, settings

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, number: int) -> PreparedQuery:
        query, s = self._queries[number], self._settings
        try:
            crop = crop_of(query.read(), s.crop_size, s.max_msa_rows, s.seed, s.features)
        except DataError as error:
            # All ranks read the same bytes and come to the same answer.
            return PreparedQuery(query, None, {}, str(error))
        padding = Padding(GPU_MULTIPLE if self._strategy.root_device.type == "cuda" else 1)
        feats = collate([crop], self._strategy.grid, padding)
        return PreparedQuery(query, crop, {name: value for name, value in feats.items() if name != "id"})


class Predictor(LightningModule):
    """Samples structures with a model.

    Args:
        model: has ``predict(feats, cp, *, recycling_steps, sampling_steps, samples, draws)``.
        settings: how to sample.
        writer: receives the results.
    """

    def __init__(self, model: nn.Module, settings: Settings, writer: Writer) -> None:
        super().__init__()
        self.model = model
        self._settings, self._writer = settings, writer

    def transfer_batch_to_device(
        self, batch: PreparedQuery, device: torch.device, dataloader_idx: int
    ) -> PreparedQuery:
        """All but what stays on the host; also to double precision where the weights are in it."""
        dtype = next(self.model.parameters()).dtype
        double = dtype if dtype == torch.float64 else None

        def there(x: Tensor) -> Tensor:
            return x.to(device, double if x.is_floating_point() else None)

        feats = {name: x if name == ON_HOST else there(x) for name, x in batch.feats.items()}
        return PreparedQuery(batch.query, batch.crop, feats, batch.reason)

    def predict_step(self, batch: PreparedQuery, batch_idx: int) -> None:
        """Sample one query.

        Raises:
            RuntimeError: naming the query and its size, where the model fails.
        """
        query, crop = batch.query, batch.crop
        cp = self.trainer.strategy.cp
        if crop is None:
            if cp.all.index == 0:
                self._writer.fail(query, batch.reason)
            return
        try:
            self._sample(query, crop, batch.feats, cp)
        except Exception as error:
            size = f"{len(crop.tokens):,} tokens, {len(crop.atoms.atom):,} atoms"
            raise RuntimeError(f"{query.id} ({size}) failed: {type(error).__name__}: {error}") from error

    def sampled(self, feats: dict[str, Any], cp: ContextParallel) -> dict[str, Tensor]:
        """What the model makes of a query's tiles: this rank's part of all samples."""
        s = self._settings
        return self.model.predict(
            feats,
            cp,
            recycling_steps=s.recycling_steps,
            sampling_steps=s.sampling_steps,
            samples=s.samples,
            draws=RandomStreams(feats["sample_key"]),
        )

    def _sample(self, query: Query, crop: Crop, feats: dict[str, Any], cp: ContextParallel) -> None:
        out = self.sampled(feats, cp)
        for rank, number in enumerate(_order(out, self._settings.samples, cp)):
            prediction = collect(out, number, crop, cp)
            if prediction is not None:
                self._writer.write(query, crop, rank, prediction)
        if cp.all.index == 0:
            self._writer.finish(query, crop)


def _order(out: dict[str, Tensor], samples: int, cp: ContextParallel) -> list[int]:
    """Samples from the most to the least confident; as they were drawn where the model does not say."""
    if RANKING not in out:
        return list(range(samples))
    # By the first rank's scores: ranks that disagreed in the last bit would collect parts of different samples.
    score = gather_tensor(out[RANKING].float(), cp.all)[0]
    return torch.sort(score, descending=True, stable=True).indices.tolist()


def collect(out: dict[str, Tensor], number: int, crop: Crop, cp: ContextParallel) -> Prediction | None:
    """Put a sample together on the first rank of the grid, without its padding; None on the others.

    Args:
        out: the model's, with every rank's own atoms and tiles.
        number: which sample.
    """
    n, a = len(crop.tokens), len(crop.atoms.atom)
    coords = _gathered(out["coords"][number], cp.all)
    tiles = {name: _gathered(out[name][number], cp.all) for name in ("pae", "pde") if name in out}
    if coords is None:
        return None
    arrays = {name: join_tiles(tile, cp.grid, np.concatenate)[:n, :n] for name, tile in tiles.items()}
    if "plddt" in out:
        arrays["plddt"] = out["plddt"][number, :n].float().cpu().numpy()
    scores = {name: x[number].tolist() for name, x in out.items() if x.ndim == 1 or name == "pair_chains_iptm"}
    return Prediction(coords.reshape(-1, 3)[:a], scores, arrays)


def _gathered(x: Tensor, axis: Axis) -> np.ndarray | None:
    stacked = gather_to_first(x.float(), axis)
    return None if stacked is None else stacked.cpu().numpy()
