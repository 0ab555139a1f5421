#!/usr/bin/env bash
# Builds the extension in place (python/runtime) for work on the sources: tools/develop.sh [build folder]
# Then: PYTHONPATH=python pytest tests/...
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/develop}
python=${PYTHON:-python3}
cmake -S "$root" -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"${TMPDIR:-/tmp}/partita-cmake.log" || { cat "${TMPDIR:-/tmp}/partita-cmake.log"; exit 1; }
ninja -C "$build"
cp -f "$build"/_native*.so "$build"/libpartita_kernels.so "$root/python/runtime/"
