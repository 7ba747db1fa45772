#!/usr/bin/env bash
# Installs the test extra and runs the long tests, which scripts/test.sh leaves out; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
exec .venv/bin/python -m pytest -m long -n 2 --dist load "$@"
