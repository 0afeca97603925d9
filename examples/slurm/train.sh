#!/bin/bash
#SBATCH --job-name=bsc-train
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
# A sweep by an array of jobs: each trains its share of the coders. There should be as many coders as
# jobs, or more; the jobs need not run at the same time. The one that ends last makes one run of
# them. A job that is taken away and queued again goes on from its last checkpoint.
#
#   STORE=/shared/acts sbatch examples/slurm/train.sh sweep.toml
set -euo pipefail
STORE=${STORE:?"say where the store is, for example STORE=/shared/acts"}

exec bsc train "$@" --store "$STORE" --continue \
    --rank "$SLURM_ARRAY_TASK_ID" --world "$SLURM_ARRAY_TASK_COUNT"
