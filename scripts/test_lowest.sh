#!/usr/bin/env bash
# Installs the lowest versions that setup.py allows into a virtual environment of its own and runs
# the tests with them. VENV names its folder; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-lowest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# Every lower bound becomes the version: "jax>=0.10.2" in setup.py gives "jax==0.10.2".
sed -nE 's/^.*"([A-Za-z][A-Za-z0-9_.-]*)(>=|~=)([0-9.]+).*$/\1==\3/p' setup.py > "$venv/lowest.txt"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$venv/lowest.txt")
"${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
"${pip[@]}" -e ".[test]"
exec "$venv/bin/python" -m pytest "$@"
