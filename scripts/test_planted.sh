#!/usr/bin/env bash
# Installs the test extra and plants faults, to see whether the tests notice them; arguments go to tests/planted/plant.py.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
exec .venv/bin/python -m tests.planted.plant "$@"
