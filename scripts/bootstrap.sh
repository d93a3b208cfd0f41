#!/usr/bin/env bash
# Sets up a virtual environment with the package in it (editable), for the Makefile and by hand.
#
#   scripts/bootstrap.sh VENV EXTRA[,EXTRA...]      e.g. scripts/bootstrap.sh .venv dev
#
# Environment: PYTHON (python3), TORCH (what pip is asked for, torch==2.13.0).
# The order matters: torch first and pinned, so that no other package picks one; then the build
# tools, so that the extension is compiled against that torch instead of a second copy in an
# isolated build environment; then the package.
set -euo pipefail

VENV=${1:?usage: scripts/bootstrap.sh VENV EXTRAS}
EXTRAS=${2:?usage: scripts/bootstrap.sh VENV EXTRAS}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
TRITON=${TRITON:-triton==3.6.0}
LOG=$VENV/bootstrap.log
export PIP_DISABLE_PIP_VERSION_CHECK=1

cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
fail() { say "bootstrap: $1"; say "  what to do: $2"; exit 1; }

# Runs a command with its output in the log; on failure shows the end of it and says what to do.
quietly() {
  local advice=$1; shift
  if ! "$@" >>"$LOG" 2>&1; then
    tail -n 25 "$LOG" >&2
    fail "'$*' failed (whole log: $LOG)" "$advice"
  fi
}

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' on the PATH" \
  "install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
  "$PYTHON is $("$PYTHON" -V 2>&1), Python 3.10 or newer is needed" "make PYTHON=python3.12"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON has no venv module" \
  "on Debian or Ubuntu: apt-get install python3-venv"

if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV"
  "$PYTHON" -m venv "$VENV" || fail "could not create $VENV" "rm -rf $VENV and try again"
fi
PIP=("$VENV/bin/python" -m pip install --quiet)
: >"$LOG"

# requirements TABLE.KEY prints that list of pyproject.toml, torch left out.
requirements() {
  "$VENV/bin/python" - "$1" <<'PY'
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    held = tomllib.load(file)
for part in sys.argv[1].split("."):
    held = held[part]
print("\n".join(name for name in held if not name.startswith("torch")))
PY
}

if [ "$EXTRAS" = docs ]; then # the site is made from text alone
  say "installing mkdocs"
  mapfile -t tools < <(requirements project.optional-dependencies.docs)
  quietly "check the network; the log says which package failed" "${PIP[@]}" "${tools[@]}"
  exit 0
fi

say "installing ${TORCH}"
# shellcheck disable=SC2086  # TORCH may hold options, such as an index for another build
quietly "check the network, or choose another build: make TORCH='torch==2.13.0 --index-url URL'" \
  "${PIP[@]}" $TORCH

say "installing the build tools"
mapfile -t tools < <(requirements build-system.requires)
quietly "check the network; the log says which package failed" "${PIP[@]}" "${tools[@]}" cmake ninja

if ! { command -v "${CXX:-c++}" || command -v g++ || command -v clang++; } >/dev/null; then
  fail "no C++ compiler found" "on Debian or Ubuntu: apt-get install g++; or set CXX"
fi
say "compiling and installing dlms_engine[$EXTRAS]"
quietly "the log names the first error; a compiler with C++17 is needed" \
  env PATH="$PWD/$VENV/bin:$PATH" "${PIP[@]}" --no-build-isolation --editable ".[$EXTRAS]"

# The Triton kernels are tested under its interpreter, which needs no GPU. CUDA builds of torch bring
# their own triton; elsewhere it is added without dependencies so that torch is left alone.
if [[ ",$EXTRAS," == *,dev,* ]] && ! "$VENV/bin/python" -c 'import triton' 2>/dev/null; then
  "${PIP[@]}" --no-deps "$TRITON" >>"$LOG" 2>&1 ||
    say "no $TRITON for this platform: the tests of the Triton kernels will be skipped"
fi
"$VENV/bin/python" -c 'import dlms_engine' || fail "dlms_engine does not import" \
  "rm -rf $VENV build and try again"
