#!/usr/bin/env bash
# Fetches the real open models and runs their tests, which compare with transformers, peft and
# lm-eval; arguments go to pytest. REAL_MODELS=gemma-3-270m chooses one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
export TEST_DEVICES=1
export REAL_MODELS="${REAL_MODELS:-smollm2-135m,gemma-3-270m}"
scripts/real_models.sh ${REAL_MODELS//,/ }
exec .venv/bin/python -m pytest tests/real "$@"
