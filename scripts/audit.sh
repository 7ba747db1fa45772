#!/usr/bin/env bash
# Writes docs/sbom.json and asks the vulnerability database of PyPI about every package in it (needs network).
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python scripts/sbom.py docs/sbom.json
[ -x .venv-audit/bin/python ] || .venv/bin/python -m venv .venv-audit
.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
.venv/bin/python scripts/sbom.py --requirements > .venv-audit/packages.txt
exec .venv-audit/bin/pip-audit --disable-pip --no-deps --strict -r .venv-audit/packages.txt
