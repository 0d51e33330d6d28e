"""The Lightning strategy with ``parallel.fsdp=true``: the grid as ever, parameters and optimizer sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpfold_train.checkpoints.sharded import is_sharded_checkpoint, load_sharded, save_sharded
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.msa import MSALayer
from cpfold_train.model.pairformer import PairformerLayer
from cpfold_train.model.transformer import DiffusionTransformerLayer
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.sharding import mesh_of, shard, shard_parameters
from cpfold_train.training.strategy import GridStrategy

BLOCKS = PairformerLayer, MSALayer, DiffusionTransformerLayer
"""What is gathered as one. The small blocks of the template module are not among them: they run once for each template,
of which replicas have different numbers, and all ranks must gather as often."""
_STATES = "state_dict", "current_model_state"


def shard_model(model: CoFolding, cp: ContextParallel) -> None:
    """Shard the parameters of a model, one block of a stack at a time."""
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    shard_parameters(model, blocks, [(model, "sample"), (model, "predict_confidence")], cp)


class ShardedGridStrategy(GridStrategy):
    """:class:`GridStrategy` with FSDP2 instead of ``DistributedDataParallel``.

    Gradients are sharded after each micro-batch, also under accumulation: kept until the last one, each rank would
    hold all of them. A checkpoint is a directory (:mod:`cpfold_train.checkpoints.sharded`).
    """

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Each rank reads its own part only, so it must be known which that is."""
        return True

    def configure_ddp(self) -> None:
        shard_model(self.lightning_module.model, self.cp)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        save_sharded(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if is_sharded_checkpoint(path):
            return load_sharded(path, mesh_of(self.lightning_module))
        # Checkpoints hold loops and loader beside tensors: read only those that you trust.
        return self._sharded(super().load_checkpoint(path, weights_only=False))

    def _sharded(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of a run without FSDP, its parameters and the optimizer's state of them sharded, in place."""
        mesh = mesh_of(self.lightning_module)
        parameters = {name for name, _ in self.lightning_module.named_parameters(remove_duplicate=False)}
        for state in (checkpoint[key] for key in _STATES if key in checkpoint):
            state.update({name: shard(x, mesh) for name, x in state.items() if name in parameters})
        for optimizer in checkpoint["optimizer_states"]:
            for state in optimizer["state"].values():
                # What has no dims is a count of steps, which every rank keeps.
                state.update({name: shard(x, mesh) for name, x in state.items() if x.ndim})
        return checkpoint
