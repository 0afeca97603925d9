#!/bin/bash
#SBATCH --job-name=bsc-train-together
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --requeue
# A few large coders on many GPUs, which share the rows of each coder: all have to run at the same
# time, and talk to each other. The runs have to be in a folder that all nodes share.
#
#   STORE=/shared/acts sbatch examples/slurm/train_together.sh sweep.toml
#
# Longer than the time limit: submit it several times with --dependency=singleton.
set -euo pipefail
STORE=${STORE:?"say where the store is, for example STORE=/shared/acts"}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${PORT:-29500}" \
    --no-python bsc train "$@" --store "$STORE" --continue
