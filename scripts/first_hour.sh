#!/usr/bin/env bash
# The first hour of a new user with a real model: scripts/first_hour.sh MODEL [OUT]
# MODEL is a folder or Hub id, such as one that scripts/real_models.sh has fetched. tests/test_first_hour.py is the
# same with a small model. Every command must succeed; what it prints is in OUT/*.txt.
set -euo pipefail
model=${1:?give a model folder or a Hub id}
out=${2:-runs/first_hour}
mkdir -p "$out"
cat > "$out/config.py" <<CONFIG
from crossin_jax.config import Component, Config, Data, Evaluation, Lora, Model, Source, Train


def get_config():
    return Config(
        name="x2x",
        output_dir="$out/run",
        model=Model(path="$model"),
        lora=Lora(rank=8, alpha=16.0, modules_to_save=()),
        data=Data(
            sources=(Source(name="facts", kind="world", split="train"),),
            components=(Component(kind="x2x", source="facts"),),
            languages=("es", "id"),
            template="alpaca",
            length=256,
        ),
        train=Train(steps=5, batch_size=4, log_every=1),
        evaluation=Evaluation(benchmarks=("cross_world:dev",), limit=10, untuned=True),
    )
CONFIG
run() { echo "+ python -m crossin_jax.$*"; python -m "crossin_jax.$@" 2>&1 | tee "$out/$1.txt"; }
run train --config "$out/config.py"
run evaluate --checkpoint "$out/run" --format=markdown
run evaluate --config "$out/config.py"
run evaluate --compare "$out/run/evaluation-untuned" "$out/run/evaluation"
echo '{"id": 1, "prompt": "¿Cuál es la capital de Perú?"}' > "$out/prompts.jsonl"
run generate --model "$out/run" --prompts "$out/prompts.jsonl" --out "$out/answers.jsonl" --max_new_tokens=16
rm -rf "$out/adapter"
run export --checkpoint "$out/run" --format peft --out "$out/adapter"
grep -q '"generated"' "$out/answers.jsonl"
grep -q '^base_model:' "$out/adapter/README.md"
echo "the first hour went through: $out"
