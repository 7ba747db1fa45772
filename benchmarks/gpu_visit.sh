#!/usr/bin/env bash
# One visit to a GPU of about twelve minutes, in the order of what is worth most. Every step has a time limit of its own and
# writes its result at once, so that a visit that is cut short keeps what it has.
#
#   benchmarks/gpu_visit.sh [FOLDER]           on the machine with the GPU
#   benchmarks/gpu_visit.sh --quick [FOLDER]   the rehearsal: the same code with tiny shapes, on a CPU unless JAX_PLATFORMS says otherwise
#
# It expects a Python (PYTHON=…, default python3) with jax 0.11 for CUDA 13, the package's requirements, and for the
# comparisons PyTorch, transformers and peft.
set -uo pipefail
cd "$(dirname "$0")/.."
quick=()
if [ "${1:-}" = --quick ]; then quick=(--quick); shift; export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}; fi
out=${1:-benchmarks/results}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
stamp=$(date -u +%F)-gpu${quick:+-rehearsal}
failed=0

# step NAME SECONDS COMMAND…: runs a command within a limit; its output goes to the screen and into a file
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  [ ${#quick[@]} = 0 ] || limit=$((5 * limit)) # a CPU compiles slowly, above all beside other work
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" > >(tee "$out/$stamp-$name.log") 2>&1 || code=$?
  echo "== $name: exit code $code after $((SECONDS - start)) s"
  [ "$code" = 0 ] || failed=$((failed + 1))
}

step environment 60 "$python" - <<'PYTHON'
import importlib.metadata as metadata
import jax
for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "peft"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
print("devices:", jax.devices(), jax.devices()[0].device_kind)
PYTHON
step kernel 90 "$python" benchmarks/gpu_kernel.py "${quick[@]}" --out "$out/$stamp-kernel.json"
step full 150 "$python" benchmarks/gpu.py "${quick[@]}" --only full --out "$out/$stamp-full.json"
step lora 180 "$python" benchmarks/gpu.py "${quick[@]}" --only lora --out "$out/$stamp-lora.json"
step decode 120 "$python" benchmarks/gpu.py "${quick[@]}" --only decode --out "$out/$stamp-decode.json"
step answers 120 "$python" benchmarks/gpu_answers.py "${quick[@]}" --out "$out/$stamp-answers.json"
step profile 90 "$python" benchmarks/gpu_profile.py "${quick[@]}" --out "$out/$stamp-profile.json"
echo "$failed steps failed; results are in $out"
exit "$((failed > 0))"
