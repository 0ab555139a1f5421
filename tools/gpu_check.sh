#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests marked gpu, the engine's tests with --device cuda, benches.
#
#   tools/gpu_check.sh --prepare [FOLDER]     on a machine with nvcc, GPU or not: builds the kernel libraries for one
#                                             architecture (PARTITA_CUDA_ARCHITECTURES, default 90a-real) into FOLDER
#                                             (default build/gpu_check), small enough to carry along
#   tools/gpu_check.sh [OUT] [options]        on a machine with a GPU, needs no network: uses its python3 (torch, numpy,
#                                             pytest, pybind11, cmake), builds the Python skin over the libraries in
#                                             build/gpu_check and leaves logs and JSON in OUT (default build/gpu_out)
#     --libraries FOLDER   take the ready libraries from here
#     --build              build everything here instead, for the GPU's own architecture
#     --only PART[,PART]   parts: kernels, engine, bench, model (default: these, in this order), candidates (every matmul
#                          kernel at the shapes of Llama-3-8B, and the selection table of the quickest)
#     --sanitize           run the kernel tests under compute-sanitizer (memcheck, then racecheck) as well
#     --seconds N          stop starting parts after so long (default 500)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

if [ "${1:-}" = --prepare ]; then
  set -e
  folder=${2:-$root/build/gpu_check}
  architectures=${PARTITA_CUDA_ARCHITECTURES:-90a-real}
  mkdir -p "$folder"
  cmake -S . -B build/gpu_kernels -G Ninja -DPARTITA_PYTHON=OFF -DPARTITA_SIMT=OFF -DPARTITA_CUDA=on \
    "-DPARTITA_CUDA_ARCHITECTURES=$architectures" >build/gpu_kernels.log 2>&1 || { cat build/gpu_kernels.log; exit 1; }
  ninja -C build/gpu_kernels | tee "$folder/build.log" | tail -n 1
  cp build/gpu_kernels/libpartita_kernels.so build/gpu_kernels/libpartita_cuda.so "$folder/"
  strip --strip-unneeded "$folder"/libpartita_*.so
  git rev-parse HEAD >"$folder/commit"
  bytes=$(cat "$folder"/libpartita_*.so | wc -c)
  echo "gpu_check: $folder holds $((bytes >> 20)) MiB of libraries for $architectures"
  [ "$bytes" -le $((60 << 20)) ] || { echo "gpu_check: more than 60 MiB; raise no limit, drop instantiations"; exit 1; }
  exit 0
fi

out=$root/build/gpu_out
libraries=$root/build/gpu_check
parts=kernels,engine,bench,model
builds=0
sanitizes=0
seconds=500
while [ $# -gt 0 ]; do
  case $1 in
    --libraries) libraries=$2; shift ;;
    --build) builds=1 ;;
    --only) parts=$2; shift ;;
    --sanitize) sanitizes=1 ;;
    --seconds) seconds=$2; shift ;;
    -*) echo "gpu_check: got $1, wanted --libraries, --build, --only, --sanitize or --seconds"; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
failures=0
summary=$out/summary.txt
: >"$summary"
say() { echo "$*" | tee -a "$summary"; }
wants() { case ",$parts," in *",$1,"*) [ "$SECONDS" -lt "$seconds" ] || { say "$1: not started, $SECONDS s are over"; return 1; } ;; *) return 1 ;; esac; }
# One part: its output goes to a file, its last lines and its time to the summary.
part() {
  local name=$1; shift
  local begin=$SECONDS
  timeout $((seconds - SECONDS > 30 ? seconds - SECONDS : 30)) "$@" >"$out/$name.log" 2>&1
  local status=$?
  say "$(printf '%-28s %s, %d s' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - begin)))"
  tail -n 4 "$out/$name.log" | sed 's/^/    /' | tee -a "$summary"
  [ $status = 0 ] || failures=$((failures + 1))
}

python=${PYTHON:-python3}
command -v nvidia-smi >/dev/null || { echo "gpu_check: no nvidia-smi: this machine has no NVIDIA GPU"; exit 1; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total --format=csv |
  tee "$out/gpu.csv"
git rev-parse HEAD >"$out/commit" 2>/dev/null || cp "$libraries/commit" "$out/commit" 2>/dev/null
date -u +%F >"$out/date"

if [ $builds = 1 ]; then
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  [ "$capability" = 90 ] && capability=90a
  options="-DPARTITA_CUDA=on -DPARTITA_CUDA_ARCHITECTURES=$capability-real -DPARTITA_SIMT=OFF"
else
  options="-DPARTITA_KERNEL_FOLDER=$libraries"
  cp "$libraries"/libpartita_*.so python/runtime/ || exit 1
fi
begin=$SECONDS
PARTITA_CMAKE_ARGS="$options" PYTHON=$python tools/develop.sh "$root/build/gpu_skin" >"$out/build.log" 2>&1 ||
  { tail -n 30 "$out/build.log"; exit 1; }
say "build $((SECONDS - begin)) s"
export PYTHONPATH=$root/python:$root PYTHONUNBUFFERED=1
"$python" -m runtime.doctor --seconds 0 >"$out/doctor.txt" 2>&1 || cat "$out/doctor.txt"

test_flags="-q -p no:cacheprovider"
if wants kernels; then part kernel_tests "$python" -m pytest $test_flags -m gpu --junitxml="$out/kernels.xml" tests/kernels; fi
if [ $sanitizes = 1 ]; then
  for tool in memcheck racecheck; do
    part sanitize_$tool compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest $test_flags -m gpu tests/kernels
  done
fi
if wants engine; then part engine_tests "$python" -m pytest $test_flags --device cuda --junitxml="$out/engine.xml" tests/runtime; fi
if wants bench; then
  for bench in bench/kernels/bench_gpu_*.py; do
    name=$(basename "$bench" .py)
    [ "$name" = bench_gpu_step ] && continue  # a whole model: the last part
    wants bench && part "$name" "$python" "$bench" --json "$out/$name.json"
  done
fi
if wants model; then part bench_gpu_step "$python" bench/kernels/bench_gpu_step.py --json "$out/bench_gpu_step.json"; fi
if wants candidates; then
  part candidates "$python" bench/kernels/bench_gpu_gemm.py --candidates --models Llama-3-8B --tokens 1,8,16,64,256,1024,4096 \
    --seconds 300 --json "$out/candidates.json"
fi
say "gpu_check: $failures parts failed, $SECONDS s; logs and JSON in $out"
[ $failures = 0 ]
