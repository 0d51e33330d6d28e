#!/usr/bin/env bash
# One run on the GPUs of several machines, one task a GPU (not measured):
#   sbatch --nodes=4 recipes/slurm/several_nodes.sh recipe=finetune_boltz2_large_crop cp.grid=4x8
# What follows the script's name goes to train.py; cp.grid=auto takes the squarest grid whose rows each lie on one machine.
# The run is in runs/slurm-JOB.0 of a file system that all machines see, and goes on from its last checkpoint when SLURM
# puts the job back into the queue. docs/scaling.md explains each line.
#SBATCH --job-name=cpfold_train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Back into the queue after a pre-emption (SIGTERM), and by the run itself five minutes before the time is over (SIGUSR1).
#SBATCH --requeue
#SBATCH --signal=USR1@300
# One log for all starts of the job.
#SBATCH --open-mode=append
set -euo pipefail
export OMP_NUM_THREADS=1
# Since SLURM 22.05 srun does not take --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The network that the machines share, where NCCL does not find the right one by itself:
# export NCCL_SOCKET_IFNAME=ib0
# Tasks are numbered machine by machine, and the grid row by row. When one of them fails, all end.
srun --distribution=block --kill-on-bad-exit=1 \
    .venv/bin/python train.py trainer.accelerator=gpu ckpt_path=last "$@"
