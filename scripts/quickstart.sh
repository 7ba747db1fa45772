#!/usr/bin/env bash
# Installs crossin_jax and runs the miniature study on this machine's CPU: one command, no download beyond pip.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
JAX_PLATFORMS=cpu exec .venv/bin/python -m crossin_jax.study --config configs/quickstart.py "$@"
