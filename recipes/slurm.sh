#!/usr/bin/env bash
# One run on the nodes of a SLURM allocation, one task a GPU (not measured):
#   sbatch recipes/slurm.sh model=small crop_size=1536 cp.grid=2x4
# What follows the script's name goes to train.py. Ranks are numbered node by node and the grid row by row, so with as many
# columns as GPUs a node each row of the grid stays inside one node.
#SBATCH --job-name=cpfold_train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Five minutes before the end: save, ask for another 24 hours, and go on there. Pre-emption needs no more than --requeue.
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -euo pipefail
srun .venv/bin/python train.py trainer.accelerator=gpu ckpt_path=last "$@"
