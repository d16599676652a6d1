#!/bin/bash
# A run on a Slurm cluster, one process a GPU: sbatch launch/slurm.sh WORKDIR CONFIG [--config.field=value ...]
# The workdir lies on a file system that all nodes share. Slurm begins the job again after a preemption, and the run
# goes on from its newest checkpoint.
#SBATCH --job-name=transformer-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
workdir=$1 config=$2
shift 2
srun --kill-on-bad-exit=1 python3 -m transformer_lm.main --workdir="$workdir" --config="$config" "$@"
