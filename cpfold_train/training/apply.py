"""What a configuration makes of the model, in the order in which it is applied.

The run calls all of it, the planner what is of the model, and predictions what is of the process: nothing of this is
said a second time.

    set_up_process     rows at a time, compiled regions
    prepare_module     fresh weights and what a step recomputes, precision, weights to start from, LoRA and frozen parts
    make_strategy      the grid; FSDP or DistributedDataParallel, which take the module when the ranks are up
    cli/run.py         callbacks: first the moving average, so that it sees the weights where they stay

Within a step autocast goes around the model, and with fp8 Transformer Engine around its linear layers
(:mod:`cpfold_train.training.precision`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from cpfold_train.checkpoints.boltz import initialise, read_checkpoint
from cpfold_train.checkpoints.features import told_features
from cpfold_train.config.schema import TrainConfig
from cpfold_train.config.world import is_first_rank
from cpfold_train.kernels.by_rows import set_block_bytes
from cpfold_train.kernels.regions import compile_regions, compiled_by
from cpfold_train.memory import return_large_tensors
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig
from cpfold_train.parallel.grid import Grid
from cpfold_train.training.freeze import choose_trained
from cpfold_train.training.fsdp import ShardedGridStrategy
from cpfold_train.training.module import CoFoldingModule
from cpfold_train.training.quiet import quiet_lightning
from cpfold_train.training.strategy import GridStrategy, leave_out


def set_up_process(memory: MemoryConfig, compile: bool) -> None:
    """What holds for all models of this process.

    Args:
        memory: ``chunk_mib`` is how much is worked on at a time.
        compile: whether torch.compile fuses what launches many small kernels.
    """
    quiet_lightning()
    return_large_tensors()
    set_block_bytes(block_bytes(memory))
    compile_regions(compiled_by("inductor") if compile else None)


def block_bytes(memory: MemoryConfig) -> int | None:
    """Size of the widest intermediate of what is computed a few rows at a time; None is the device's own."""
    return None if memory.chunk_mib is None else int(memory.chunk_mib * 2**20)


def prepare_module(config: TrainConfig) -> CoFoldingModule:
    """The module before any rank starts, so that what cannot work is told at once. The seed is set before.

    Raises:
        ConfigError: weights to start from do not fit, patterns name nothing, or nothing is left that has a loss.
    """
    # 1. Fresh weights. ``memory`` says what blocks recompute and offload: each wraps itself where it is called.
    features = config.data.features
    model = replace(config.model, features=features)
    module = CoFoldingModule(
        model, config.memory, config.optim, config.loss, config.diffusion, config.seed, config.finetune
    )
    # 2. Precision of the weights, before any are read: those of fp64 would be rounded.
    set_width(module.model, str(config.trainer.precision))
    # 3. Weights to start from. A run that resumes gets its own, with optimizer and loops, when the ranks are up.
    if config.model.init_from and not config.ckpt_path:
        start = Path(config.model.init_from)
        initialise(module.model, start, config.model.init_weights, config.model.init_skip)
        note = told_features(features, read_checkpoint(start), start, "data.features=")
        if note and is_first_rank():
            print(f"note: {note}", file=sys.stderr)
    # 4. LoRA and what is frozen, after the weights: a checkpoint to start from has no LoRA.
    module.trains_confidence = choose_trained(module.model, config.finetune, module.trains_confidence)
    # 5. What has no loss is no business of DistributedDataParallel.
    without_loss = {
        "model.confidence_module": not module.trains_confidence,
        # Nothing comes of its embeddings.
        "model.trunk.msa_module": config.model.msa.msa_blocks == 0,
    }
    leave_out(module, *(part for part, has_none in without_loss.items() if has_none))
    return module


def set_width(model: CoFolding, precision: str) -> None:
    """How wide the weights are, and z between and within blocks; autocast is not of the model.

    ``64-true``: all in fp64. Lightning would convert the module after it has read the checkpoint. ``bf16-true``: the
    pair representation, the MSA and all that has their size are held in bf16. Lightning's own bf16-true casts all
    weights and the batch, coordinates included, and with them the fp32 islands. Here weights stay in fp32, and are
    rounded where they are used: those outside the islands are few, and AdamW's steps are mostly too small to change a
    bf16 weight.
    """
    if precision == "64-true":
        model.double()
    elif precision == "bf16-true":
        model.trunk.pair_dtype = torch.bfloat16


def make_strategy(config: TrainConfig, grid: Grid) -> GridStrategy:
    """The grid, which modules get as an argument of their forward pass, and who sums gradients and holds weights."""
    strategy = ShardedGridStrategy if config.parallel.fsdp else GridStrategy
    timeout = timedelta(seconds=config.cp.timeout_s)
    return strategy(grid.rows, grid.cols, grid.dp, timeout, config.cp.algorithm, config.kernels)
