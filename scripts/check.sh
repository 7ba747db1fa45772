#!/usr/bin/env bash
# Installs the test extra and checks format and lint of all Python files.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
