#!/usr/bin/env bash
# The ranks of one node of task.yaml, one on each GPU; the first of the first node drives the run, the others follow.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=${RUN:-$(basename "$RECIPE" .toml)}
WORLD_SIZE=$((SKYPILOT_NUM_NODES * SKYPILOT_NUM_GPUS_PER_NODE))
MASTER_ADDR=${SKYPILOT_NODE_IPS%%$'\n'*} # the first: where training meets
export WORLD_SIZE MASTER_ADDR MASTER_PORT=29500

cd "${WORK:-.}"
ranks=()
trap 'kill "${ranks[@]}" 2>/dev/null || true' EXIT TERM INT
for ((gpu = 0; gpu < SKYPILOT_NUM_GPUS_PER_NODE; gpu++)); do
    export RANK=$((SKYPILOT_NODE_RANK * SKYPILOT_NUM_GPUS_PER_NODE + gpu)) CUDA_VISIBLE_DEVICES=$gpu
    if [ "$RANK" -eq 0 ]; then
        selfimprove iterate "$RECIPE" --run "$run" --machine "$here/machine.toml" \
            --set machine.nodes="$WORLD_SIZE" &
    else
        selfimprove work "$run" &
    fi
    ranks+=("$!")
done
for _ in "${ranks[@]}"; do
    wait -n # the first that fails ends the others, and the task
done
