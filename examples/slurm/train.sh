#!/bin/bash
#SBATCH --job-name=bsc-train
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# A sweep by an array of jobs: each trains its share of the coders. There should be as many coders as
# jobs, or more; the jobs need not run at the same time. The one that ends last makes one run of
# them. A job that is taken away and queued again goes on from its last checkpoint.
#
#   STORE=/shared/acts sbatch examples/slurm/train.sh sweep.toml
#
# Longer than the time limit: submit it several times with --dependency=singleton; each goes on where
# the one before was. One part alone: WORLD=8 ... sbatch --array=3 ...
set -euo pipefail
STORE=${STORE:?"say where the store is, for example STORE=/shared/acts"}

exec bsc train "$@" --store "$STORE" --continue \
    --rank "$SLURM_ARRAY_TASK_ID" --world "${WORLD:-$SLURM_ARRAY_TASK_COUNT}"
