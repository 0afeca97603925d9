#!/bin/bash
# Ten billion tokens through a bounded disk: an array of jobs captures, another trains on the rows
# while they pass. Either may be taken away and queued again; `bsc ring "$STORE"` says how far both
# are, and what the ring waits for.
#
#   STORE=/shared/acts WRITERS=2 TRAINERS=4 bash examples/slurm/ring.sh sweep.toml \
#       --model SmolLM2-135M --tokens 10B --ring 512
#
# What stands behind the sweep goes to `bsc cache`.
set -euo pipefail
STORE=${STORE:?"say where the store is to be, for example STORE=/shared/acts"}
SWEEP=${1:?"name the file of the sweep first"}
shift
here=$(dirname "$0")
export STORE

sbatch --array="0-$((${WRITERS:-1} - 1))" "$here/capture.sh" "$@"
until [ -e "$STORE/provenance.json" ]; do sleep "${POLL:-5}"; done
sbatch --array="0-$((${TRAINERS:-1} - 1))" "$here/train.sh" "$SWEEP"
