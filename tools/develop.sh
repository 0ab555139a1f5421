#!/usr/bin/env bash
# Builds the extension in place (python/runtime) for work on the sources: tools/develop.sh [build folder]
# Then: PYTHONPATH=python python -m pytest tests/...
# PYTHON names the interpreter (it needs pybind11); PARTITA_CMAKE_ARGS holds options for CMake, such as
# "-DPARTITA_CUDA=off"; CXXFLAGS and CMake's own variables work as usual.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/develop}
python=${PYTHON:-python3}
"$python" -m pybind11 --cmakedir >/dev/null || { echo "$python has no pybind11: $python -m pip install pybind11"; exit 1; }
mkdir -p "$build"
log=$build/configure.log
cmake -S "$root" -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" ${PARTITA_CMAKE_ARGS:-} >"$log" 2>&1 || { cat "$log"; exit 1; }
ninja -C "$build"
# The device libraries are there only when their options are on.
for library in "$build"/_native*.so "$build"/libpartita_*.so "$build"/csrc/simt/libpartita_simt.so; do
  [ -e "$library" ] && cp -f "$library" "$root/python/runtime/"
done
# Editors find it here: the flags of every file.
ln -sf "$build/compile_commands.json" "$root/build/compile_commands.json"
