#!/usr/bin/env bash
# Builds the GPU engine, tests it with a GPU required, looks for memory errors and races, and times
# it: one call, under ten minutes, offline.
#
#   scripts/gpu_check.sh [build|tests|sanitize|bench ...]      default: all four, in this order
#
# Environment: VENV (a virtual environment to use, else PYTHON or python3), OUT (build/gpu_check),
# BUDGET (seconds in all, 570), ARCH (the GPU's own architecture, asked of torch), VENDOR (vendor, a
# folder with packages that the machine lacks: diffusers, to be compared with; git ignores it),
# DLMS_COMMIT (the commit, where there is no git).
# Writes $OUT/gpu_check.log, $OUT/gpu_check.json and the benchmarks' JSON. Status 0: every phase
# passed. 1: a phase failed or ran out of time. 2: something that is needed is not there.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
OUT=${OUT:-$ROOT/build/gpu_check}
BUDGET=${BUDGET:-570}
PYTHON=${PYTHON:-python3}
if [[ -n ${VENV:-} && -x $VENV/bin/python ]]; then
  PYTHON=$VENV/bin/python
fi
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu_check.log
VENDOR=${VENDOR:-$ROOT/vendor}
SITE=$ROOT/build/gpu_site # the build is installed here, beside whatever the Python has
RESULTS=()
FAILED=0
: >"$LOG"

say() { printf '%s\n' "$*" | tee -a "$LOG"; }
missing() { say "gpu_check: $1"; say "  what to do: $2"; exit 2; }
remaining() { printf '%s' "$((BUDGET - SECONDS))"; }

# phase NAME LIMIT COMMAND...: runs it under LIMIT seconds, or what the budget leaves, and records it.
phase() {
  local name=$1 limit=$2 left start status outcome
  shift 2
  left=$(remaining)
  if ((left < 10)); then
    say "== $name: skipped, the budget of $BUDGET s is spent"
    RESULTS+=("{\"phase\": \"$name\", \"status\": \"out of time\", \"seconds\": 0}")
    FAILED=1
    write_json
    return 1
  fi
  ((limit > left)) && limit=$left
  say "== $name (at most $limit s)"
  start=$SECONDS
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed ($status)" ;;
  esac
  say "== $name: $outcome after $((SECONDS - start)) s"
  RESULTS+=("{\"phase\": \"$name\", \"status\": \"$outcome\", \"seconds\": $((SECONDS - start))}")
  write_json # after each phase: a machine may be taken away
  if ((status != 0)); then
    FAILED=1
    return 1
  fi
}

wanted() { [[ " $PHASES " == *" $1 "* ]]; }

write_json() {
  local joined
  joined=$(printf ',\n  %s' "${RESULTS[@]}")
  printf '{"machine": %s,\n "phases": [%s\n ]}\n' "$MACHINE" "${joined:1}" >"$OUT/gpu_check.json"
}

PHASES=${*:-build tests sanitize bench}
for name in $PHASES; do
  case $name in
    build | tests | sanitize | bench) ;;
    *) missing "no phase '$name'" "name some of: build tests sanitize bench" ;;
  esac
done

# -- what must be there ------------------------------------------------------------------------------

for package in torch triton dlms_engine; do
  [[ ! -e $VENDOR/$package ]] || missing "$VENDOR holds $package" \
    "remove it: what is tested is this checkout, with the machine's own torch and triton"
done
command -v "$PYTHON" >/dev/null || missing "no '$PYTHON'" "set PYTHON or VENV"
"$PYTHON" -c 'import torch' 2>>"$LOG" || missing "$PYTHON has no torch" \
  "use a Python with torch >= 2.11 built for CUDA: PYTHON=/path/to/python3"
for module in scikit_build_core pybind11 pytest; do
  "$PYTHON" -c "import $module" 2>>"$LOG" || missing "$PYTHON has no $module" \
    "install it: $PYTHON -m pip install ${module//_/-}"
done
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$CUDA_HOME/bin:$PATH
command -v nvcc >/dev/null || missing "no nvcc" "install CUDA 13.0 and set CUDA_HOME"
"$PYTHON" - <<'PY' 2>>"$LOG" || missing "torch sees no NVIDIA GPU" \
  "run this on a machine with one; on this one, 'scripts/compile_kernels.py' compiles the kernels"
import sys, torch
sys.exit(not torch.cuda.is_available())
PY

MACHINE=$("$PYTHON" - <<'PY'
import json, platform, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "capability": f"{p.major}.{p.minor}", "torch": torch.__version__,
                  "cuda": torch.version.cuda, "python": platform.python_version()}))
PY
)
ARCH=${ARCH:-$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
say "$MACHINE"
DLMS_COMMIT=${DLMS_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export DLMS_COMMIT
say "commit $DLMS_COMMIT"

# -- phases ----------------------------------------------------------------------------------------------

export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 DLMS_REQUIRE_CUDA=1
unset TRITON_INTERPRET # the kernels themselves, not the interpreter
if wanted build; then
  rm -rf "$SITE"
  # Only this GPU's code, to build quickly; a missing part fails the build instead of being left out.
  phase build 240 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
    --target "$SITE" --config-settings=cmake.define.DLMS_CUDA=ON \
    --config-settings="cmake.define.DLMS_CUDA_ARCHITECTURES=$ARCH-real" \
    --config-settings=cmake.define.DLMS_REQUIRE_NATIVE=ON . || exit 1
fi
[[ -d $SITE ]] || missing "nothing is built in $SITE" "run the phase 'build' too"
# An editable installation answers imports before PYTHONPATH does: what is tested here is the build.
cat >"$SITE/sitecustomize.py" <<'PY'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
PY
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
if [[ -d $VENDOR ]]; then
  export PYTHONPATH=$PYTHONPATH:$VENDOR
  say "with $VENDOR"
fi
phase backends 60 "$PYTHON" -c '
import pathlib, sys
import dlms_engine
from dlms_engine import engine, ops
place, found = pathlib.Path(dlms_engine.__file__).parents[1], ops.available("cuda")
print(f"{place}: backends for CUDA tensors {found}, loop {engine.available()}")
if place != pathlib.Path(sys.argv[1]):
    raise SystemExit("the package does not come from the build that is to be tested")
missing = {"cuda", "triton"} - set(found)
if missing:
    raise SystemExit(f"not built or not loaded: {sorted(missing)}")' "$SITE" || exit 1

# A passing run in which nothing ran is a failure: DLMS_REQUIRE_CUDA turns needs_cuda skips into
# failures. The compile checks belong to machines without a GPU.
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -W default)
if wanted tests; then
  phase tests 240 "${PYTEST[@]}" tests/kernels/test_fused_row_kernels.py \
    tests/kernels/test_triton_operators.py tests/kernels/test_graph.py \
    tests/kernels/test_graph_cache.py tests/kernels/test_sampler_cuda.py \
    -k "not interpreted and not (eager and not cuda) and not cpu"
fi

if wanted sanitize; then
  # Once without a tool: Triton then finds its kernels compiled, which a tool would slow down.
  phase rows 60 "$PYTHON" scripts/sanitize_rows.py
  # The allocator's cache hides bounds: every tensor gets an allocation of its own.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  SANITIZER=$(command -v compute-sanitizer || true)
  if [[ -z $SANITIZER ]]; then
    say "== sanitize: no compute-sanitizer on the PATH"
    RESULTS+=('{"phase": "sanitize", "status": "failed (not installed)", "seconds": 0}')
    FAILED=1
  else
    for tool in memcheck racecheck initcheck; do
      phase "$tool" 75 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
        "$PYTHON" scripts/sanitize_rows.py
    done
  fi
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

if wanted bench; then
  # What could not be measured is in their JSON with the reason; bench-step writes after each shape.
  phase bench-step 120 "$PYTHON" -m dlms_engine.lab.bench step --device cuda \
    --output "$OUT/bench_step.json"
  phase bench-loop 60 "$PYTHON" -m dlms_engine.lab.bench loop --device cuda \
    --output "$OUT/bench_loop.json"
  phase bench-row 60 "$PYTHON" -m dlms_engine.lab.bench device --output "$OUT/bench_row.json"
fi

write_json
say "wrote $OUT/gpu_check.json"
if ((FAILED)); then
  say "gpu_check: FAILED"
  exit 1
fi
say "gpu_check: passed in $SECONDS s"
