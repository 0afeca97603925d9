#!/bin/bash
# Ten billion tokens through a bounded disk: an array of jobs captures, another trains on the rows
# while they pass. Either may be taken away and queued again; `bsc ring "$STORE"` says how far both
# are, and what the ring waits for.
#
#   STORE=/shared/acts WRITERS=2 TRAINERS=6 TIMES=3 bash examples/slurm/ring.sh sweep.toml \
#       --model SmolLM2-135M --tokens 10B --ring 512
#
# What stands behind the sweep goes to `bsc cache`. Both arrays are submitted TIMES times, one after
# the other, for runs that are longer than the time limit of a job.
set -euo pipefail
STORE=${STORE:?"say where the store is to be, for example STORE=/shared/acts"}
SWEEP=${1:?"name the file of the sweep first"}
shift
here=$(dirname "$0")
times=${TIMES:-1}
export STORE

for _ in $(seq "$times"); do
    job=$(sbatch --parsable --dependency=singleton --array="0-$((${WRITERS:-1} - 1))" \
        "$here/capture.sh" "$@")
    first=${first:-$job}
done
until [ -e "$STORE/provenance.json" ]; do
    if [ -z "$(squeue --noheader --jobs "$first")" ]; then
        echo "job $first has ended and left no store; its output says why" >&2
        exit 1
    fi
    sleep "${POLL:-5}"
done
for _ in $(seq "$times"); do
    sbatch --dependency=singleton --array="0-$((${TRAINERS:-1} - 1))" "$here/train.sh" "$SWEEP"
done
