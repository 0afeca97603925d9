#!/bin/bash
#SBATCH --job-name=bsc-cache
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# A capture by an array of jobs: each writes its part of one store in a shared file system, whenever
# it gets a machine. A job that is taken away and queued again goes on where it was.
#
#   STORE=/shared/acts sbatch examples/slurm/capture.sh --model SmolLM2-135M --tokens 10B
#
# Longer than the time limit: submit it several times with --dependency=singleton; each goes on where
# the one before was. One part alone: WORLD=8 ... sbatch --array=3 ...
set -euo pipefail
STORE=${STORE:?"say where the store is to be, for example STORE=/shared/acts"}

exec bsc cache --store "$STORE" \
    --rank "$SLURM_ARRAY_TASK_ID" --world "${WORLD:-$SLURM_ARRAY_TASK_COUNT}" "$@"
