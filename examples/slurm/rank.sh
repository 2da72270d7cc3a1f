#!/usr/bin/env bash
# One rank of run.sbatch; srun starts it. The executor finds its rank in SLURM_PROCID and their number in SLURM_NTASKS,
# training the first host in SLURM_JOB_NODELIST.
set -euo pipefail

export CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
if [ "$SLURM_PROCID" -eq 0 ]; then
    exec selfimprove iterate "$RECIPE" --run "$RUN" --machine "$EXAMPLE/machine.toml" \
        --set machine.nodes="$SLURM_NTASKS" "$@"
fi
exec selfimprove work "$RUN"
