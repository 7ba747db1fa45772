#!/usr/bin/env bash
# Makes .venv and installs the package with the extras named as arguments, e.g. scripts/setup.sh test plan
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old; crossin_jax needs Python 3.11 or newer (set PYTHON=…)" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras=$(IFS=,; echo "$*")
wanted="$(cat setup.py pyproject.toml | cksum) ${extras}"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing crossin_jax${extras:+[$extras]} into .venv …"
  pip=(.venv/bin/python -u -m pip install --progress-bar off --disable-pip-version-check)
  # Python compiles what it imports at the first import; pip would compile every file. For the tests it does: warnings
  # of that first compilation are errors there.
  case " $* " in *" test "*) ;; *) pip+=(--no-compile) ;; esac
  show() {
    awk '/^Collecting/ { print "  " $2 } /^Installing/ { print "  unpacking …" } { fflush() }'
  }
  case " $* " in
    *" test "*)
      # The tests compare with torch on the CPU. Where this version is on offer as a CPU build (TORCH_INDEX names another
      # package index), it is taken first, so that nothing pulls in gigabytes of CUDA libraries later.
      "${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==2.13.0" | show ||
        echo "torch==2.13.0 is not on offer here; the newest torch is taken" >&2 ;;
  esac
  "${pip[@]}" -e ".${extras:+[$extras]}" | show
  echo "$wanted" > .venv/installed
fi
