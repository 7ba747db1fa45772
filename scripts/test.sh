#!/usr/bin/env bash
# Installs the test extra and runs the tests, without the long ones of test_long.sh; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two processes; a file's tests stay in one, its fixtures are costly
