#!/usr/bin/env bash
# Injects faults into the programs and tries generated bad input: the long part of the tests of
# docs/reliability.md, about an hour on two cores. Writes two tables to benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
day=$(date +%F)
export JAX_PLATFORMS=cpu
.venv/bin/python -m tests.faults.inputs --cases "${CASES:-2000}" | tee "benchmarks/results/$day-bad-input.txt"
exec .venv/bin/python -m tests.faults.injected --out "benchmarks/results/$day-faults.md" "$@"
