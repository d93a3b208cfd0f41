#!/usr/bin/env bash
# Checks and times the GPU engine in one call, offline: see scripts/gpu_check.py, which this runs
# with VENV's Python, or with PYTHON (python3).
set -euo pipefail

PYTHON=${PYTHON:-python3}
if [[ -n ${VENV:-} && -x $VENV/bin/python ]]; then
  PYTHON=$VENV/bin/python
fi
if ! command -v "$PYTHON" >/dev/null; then
  printf "gpu_check: no '%s'\n  what to do: set PYTHON or VENV\n" "$PYTHON"
  exit 2
fi
exec "$PYTHON" "$(dirname "$0")/gpu_check.py" "$@"
