#!/bin/bash
# A run on a Slurm cluster, one process a GPU: sbatch launch/slurm.sh WORKDIR CONFIG [--config.field=value ...]
# The workdir lies on a file system that all nodes share. Slurm begins the job again after a preemption, and the run
# goes on from its newest checkpoint. Each task sees all GPUs of its node, of which JAX gives it the one of its number.
#SBATCH --job-name=transformer-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
workdir=$1 config=$2
shift 2
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python3 -m transformer_lm.main --workdir="$workdir" --config="$config" "$@"
