#!/usr/bin/env bash
# One run on the GPUs of one machine, one task a GPU (not measured):
#   sbatch recipes/slurm/one_node.sh recipe=finetune_boltz2_large_crop cp.grid=2x4 crop_size=2048
# What follows the script's name goes to train.py. The run is in runs/slurm-JOB.0, and stays there when SLURM puts the job
# back into the queue: it goes on from its last checkpoint. docs/scaling.md explains each line.
#SBATCH --job-name=cpfold_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
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
# When one of the tasks fails, all end.
srun --kill-on-bad-exit=1 .venv/bin/python train.py trainer.accelerator=gpu ckpt_path=last "$@"
