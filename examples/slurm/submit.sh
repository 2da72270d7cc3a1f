#!/usr/bin/env bash
# Submit the followers (array.sbatch), and the driver (train.sbatch) for when all of them have started.
#
# Run:      WORKERS=8 RECIPE=iterative_dpo_7b examples/slurm/submit.sh [options of selfimprove iterate]
#           from the checkout, on a file system that all nodes share.
# Cost:     WORKERS + 8 GPUs for hours; not measured.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
workers=${WORKERS:-8}
export EXAMPLE=$here WORLD_SIZE=$((workers + 1))

array=$(sbatch --parsable --array="1-$workers" "$here/array.sbatch")
sbatch --dependency="after:${array%%;*}" "$here/train.sbatch" "$@"
