#!/usr/bin/env bash
# The job of rayjob.yaml: it runs on the head, and asks the engines of the whole cluster.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$1
run=$(basename "$recipe" .toml)

cd "${WORK:-/runs}"
selfimprove iterate "$recipe" --run "$run" --machine "$here/machine.toml" "${@:2}"
selfimprove report "$run"
