#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests marked gpu, the engine's tests with --device cuda, benches.
#
#   tools/gpu_check.sh --prepare [FOLDER]     on a machine with nvcc, GPU or not: builds the kernel libraries for one
#                                             architecture (PARTITA_CUDA_ARCHITECTURES, default 90a-real) into FOLDER
#                                             (default build/gpu_check), small enough to carry along, and wheels of what
#                                             the tests import and GPU images tend to lack
#   tools/gpu_check.sh [OUT] [options]        on a machine with a GPU, needs no network: uses its python3 (torch, numpy,
#                                             pytest, pybind11, cmake), builds the Python skin over the libraries in
#                                             build/gpu_check and leaves logs and JSON in OUT (default build/gpu_out)
#     --libraries FOLDER   take the ready libraries from here
#     --build              build everything here instead, for the GPU's own architecture
#     --only PART[,PART]   parts: kernels, engine, bench, model (default: these, in this order), candidates (every matmul
#                          kernel at the shapes of Llama-3-8B, and the selection table of the quickest)
#     --sanitize           run the kernel tests under compute-sanitizer (memcheck, then racecheck) as well
#     --seconds N          stop starting parts after so long (default 500); each part has a limit of its own below that
# OUT/results.tar.gz holds all of OUT in one file, renewed after each part.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
# What the libraries were built from and what the skin is built from must be the same: nothing else would say that a
# struct has changed between them.
sources_sum() {
  (cd "$root" && find csrc CMakeLists.txt -type f ! -name "*.md" ! -path "csrc/bindings/*" ! -path "csrc/simt/*" -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1)
}

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
  sources_sum >"$folder/sources"
  # Pure Python, and its dependencies are there wherever torch's usual companions are.
  ${PYTHON:-python3} -m pip download -q --no-deps --only-binary=:all: -d "$folder/wheels" "gguf>=0.10" >"$folder/wheels.log" 2>&1 ||
    { cat "$folder/wheels.log"; echo "gpu_check: no wheel of gguf: tests that write GGUF files will not run there"; }
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
# One part, of at most so many seconds: its output goes to a file, its last lines and its time to the summary.
part() {
  local name=$1 limit=$2; shift 2
  local begin=$SECONDS
  local left=$((seconds - SECONDS > 20 ? seconds - SECONDS : 20))
  timeout -k 10 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
  local status=$?
  say "$(printf '%-28s %s, %d s' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - begin)))"
  tail -n "${tail_lines:-4}" "$out/$name.log" | sed 's/^/    /' | tee -a "$summary"
  [ $status = 0 ] || failures=$((failures + 1))
  tar -czf "$out/results.tar.gz.new" -C "$out" --exclude='results.tar.gz*' . 2>/dev/null &&
    mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}
# Tests in several processes, started again behind what ends one: name, seconds, arguments of pytest.
tests() {
  local name=$1 limit=$2; shift 2
  local left=$((seconds - SECONDS - 15))
  [ $limit -lt $left ] || limit=$((left > 5 ? left : 5))
  tail_lines=30 part "$name" $((limit + 15)) "$python" tools/gpu_tests.py --out "$out" --name "$name" --seconds "$limit" \
    --test-seconds 60 -- "$@"
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
  [ "$(cat "$libraries/sources" 2>/dev/null)" = "$(sources_sum)" ] || {
    echo "gpu_check: $libraries was built from other sources than these: --prepare again, or --build here"; exit 1; }
  options="-DPARTITA_KERNEL_FOLDER=$libraries"
  cp "$libraries"/libpartita_*.so python/runtime/ || exit 1
fi
begin=$SECONDS
PARTITA_CMAKE_ARGS="$options" PYTHON=$python tools/develop.sh "$root/build/gpu_skin" >"$out/build.log" 2>&1 ||
  { tail -n 30 "$out/build.log"; exit 1; }
say "build $((SECONDS - begin)) s"
export PYTHONPATH=$root/python:$root PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -c "import gguf" 2>/dev/null || {
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$root/build/gpu_site" "$libraries"/wheels/*.whl \
    >"$out/wheels.log" 2>&1 || say "gguf: neither here nor in $libraries/wheels: tests that write GGUF files do not run"
  PYTHONPATH=$PYTHONPATH:$root/build/gpu_site
}
"$python" -m runtime.doctor --seconds 0 >"$out/doctor.txt" 2>&1 || cat "$out/doctor.txt"

# Of the host execution nothing is built here; the default model is fetched, and needs a network or a filled cache.
only="not simt"
[ -n "$(ls "${PARTITA_CACHE:-$HOME/.cache/partita}"/models/SmolLM2* 2>/dev/null)" ] || only="$only and not smollm2 and not default_model"
export OMP_NUM_THREADS=2
if wants kernels; then tests kernel_tests 130 -m gpu tests/kernels; fi
if [ $sanitizes = 1 ]; then
  for tool in memcheck racecheck; do
    part sanitize_$tool 600 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
      --continue-on-collection-errors -m gpu tests/kernels
  done
fi
if wants engine; then
  tests program_tests 60 --device cuda -k "$only" tests/runtime/test_gpu_program.py tests/runtime/test_gpu_engine.py
  wants engine && tests engine_tests 70 --device cuda -k "$only" tests/runtime/test_{engine,batching,lanes,lane_bank,ranges}.py \
    tests/runtime/test_{arrangements_equal,policies_equal,replay,fastgen_engine,nano_engine,model_families,program,lane_trace}.py
fi
unset OMP_NUM_THREADS
# The benches end by their own --seconds, or the JSON of what they have would be lost.
bench() {
  local name=$1 limit=$2 json=$3; shift 3
  wants bench && part "$json" "$limit" "$python" "bench/kernels/$name.py" --json "$out/$json.json" "$@"
}
if wants bench; then
  bench bench_gpu_gemm 70 bench_gpu_gemm_8b --models Llama-3-8B --seconds 55
  bench bench_gpu_attention 50 bench_gpu_attention_decode --only decode --seconds 35
  bench bench_gpu_attention 35 bench_gpu_attention_prefill --only prefill --seconds 20
  bench bench_gpu_sampling 30 bench_gpu_sampling
  bench bench_gpu_rows 30 bench_gpu_rows
fi
if wants model; then part bench_gpu_step 90 "$python" bench/kernels/bench_gpu_step.py --json "$out/bench_gpu_step.json"; fi
if wants bench; then  # what is left of the time
  bench bench_gpu_gemm 50 bench_gpu_gemm_70b --models Llama-3-70B --seconds 35
  bench bench_gpu_attention 30 bench_gpu_attention_mixed --only mixed --seconds 15
  bench bench_gpu_attention 30 bench_gpu_attention_cascade --only cascade --seconds 15
fi
if wants candidates; then
  part candidates 420 "$python" bench/kernels/bench_gpu_gemm.py --candidates --models Llama-3-8B --tokens 1,8,16,64,256,1024,4096 \
    --seconds 300 --json "$out/candidates.json"
fi
say "gpu_check: $failures parts failed, $SECONDS s; logs and JSON in $out"
[ $failures = 0 ]
