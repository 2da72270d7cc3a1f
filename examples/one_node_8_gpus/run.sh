#!/usr/bin/env bash
# A run on one node with eight GPUs.
#
# Run:      RECIPE=iterative_dpo_7b examples/one_node_8_gpus/run.sh [options of selfimprove iterate]
#           where the recipe's data files lie; runs/ is made beside them.
# Try:      RECIPE=default examples/one_node_8_gpus/run.sh --rounds 1, which takes no data of yours.
# Cost:     eight GPUs for hours; selfimprove plan says more, with the rates of machine.toml once you measured them.
# Expect:   a table of held-out accuracy for each round, and runs/RUN/report.html. Stopped or killed, the same command
#           goes on where it was.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=${RECIPE:-iterative_dpo_7b}
run=${RUN:-$(basename "$recipe" .toml)}

selfimprove iterate "$recipe" --run "$run" --machine "$here/machine.toml" "$@"
selfimprove report "$run"
