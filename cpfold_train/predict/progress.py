"""How far a prediction is: a bar on a terminal, a line for each input elsewhere."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from cpfold_train.predict.predictor import PreparedQuery


class QueryBar(TQDMProgressBar):
    """Counts queries, and names the one that is being sampled."""

    def init_predict_tqdm(self) -> Tqdm:
        bar = super().init_predict_tqdm()
        bar.set_description("inputs")
        return bar

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: PreparedQuery,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.predict_progress_bar.set_description(_named(batch))


class QueryLines(Callback):
    """Names each input before it is sampled, on the first rank."""

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: PreparedQuery,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.is_global_zero:
            print(f"input {batch_idx + 1}/{sum(trainer.num_predict_batches)}  {_named(batch)}", flush=True)


def _named(batch: PreparedQuery) -> str:
    size = "unusable" if batch.crop is None else f"{len(batch.crop.tokens):,} tokens"
    return f"{batch.query.id} ({size})"
