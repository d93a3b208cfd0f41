#!/usr/bin/env bash
# Builds one wheel, installs it into a fresh environment and samples with it, outside the source tree.
#
#   scripts/wheel.sh [FOLDER]      FOLDER (dist) gets the wheel
#
# Environment: PYTHON (python3), TORCH (torch==2.13.0; may hold options such as an index).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"${PYTHON:-python3}" -m venv "$WORK/venv"
PIP=("$WORK/venv/bin/python" -m pip --disable-pip-version-check -q)
# shellcheck disable=SC2086  # TORCH may hold options
"${PIP[@]}" install ${TORCH:-torch==2.13.0}
"${PIP[@]}" wheel --no-deps -w "$WORK/wheel" -C cmake.define.DLMS_REQUIRE_NATIVE=ON .
"${PIP[@]}" install "$WORK"/wheel/*.whl
cp scripts/wheel_smoke.py "$WORK/"
(cd "$WORK" && venv/bin/dlms doctor && venv/bin/python wheel_smoke.py)
cp "$WORK"/wheel/*.whl "$OUT/"
ls "$OUT"/*.whl
