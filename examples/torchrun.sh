#!/bin/bash
# Capture, train and measure on all GPUs of one machine. Started again, every step goes on where
# it was.
#
#   STORE=/fast/acts SWEEP=sweep.toml bash examples/torchrun.sh --model SmolLM2-135M --tokens 100M
#
# What is given goes to `bsc cache`. With fewer coders than GPUs the coders' rows are divided.
set -euo pipefail
STORE=${STORE:?"say where the store is to be, for example STORE=/fast/acts"}
SWEEP=${SWEEP:?"name the file of the sweep, for example SWEEP=sweep.toml"}
RUNS=${RUNS:-runs}
NAME=${NAME:-$(basename "${SWEEP%.toml}")}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

all() { torchrun --standalone --nproc-per-node "$GPUS" --no-python "$@"; }

all bsc cache --store "$STORE" "$@"
all bsc train "$SWEEP" --store "$STORE" --runs "$RUNS" --name "$NAME" --continue
bsc eval "$RUNS/$NAME"
bsc report "$RUNS/$NAME"
