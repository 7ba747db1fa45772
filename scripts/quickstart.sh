#!/usr/bin/env bash
# Installs crossin_jax and runs the miniature study on this machine's CPU: one command, no download beyond pip.
set -euo pipefail
cd "$(dirname "$0")/.."
cat <<'TEXT'
The miniature study, in about 5 minutes on two fast CPU cores and 10 on slow ones:
  1. install the Python packages into .venv (1 to 3 minutes; once)
  2. pretrain a model of 0.8 million parameters on facts that are mostly in English (cell 1 of 5)
  3. tune it in four ways, and ask it for other facts in four languages (cells 2 to 5)
  4. print the tables, and write runs/quickstart/report.html
Ctrl-C stops it; the same command continues where it stopped.
TEXT
scripts/setup.sh
JAX_PLATFORMS=cpu exec .venv/bin/python -m crossin_jax.study --config configs/quickstart.py "$@"
