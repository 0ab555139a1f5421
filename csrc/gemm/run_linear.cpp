#include "gemm/run_linear.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "core/chunk_claims.h"
#include "core/parallel_for.h"

namespace partita {
namespace {

constexpr int64_t kPrepareRows = 16;  // per chunk

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<float> random_rows(int64_t count) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

void run_linear(const PackedLinear& linear, const float* x, int64_t num_tokens, const float* norm_weight,
                float norm_eps, const LinearEpilogue& epilogue, int num_threads) {
  if (num_tokens == 0) return;
  if (num_threads <= 0) num_threads = usable_cores();
  const size_t row_bytes = linear.prepared_row_bytes();
  const AlignedBuffer prepared(row_bytes * num_tokens);
  parallel_for((num_tokens + kPrepareRows - 1) / kPrepareRows, num_threads, [&](int64_t chunk, int) {
    const int64_t end = std::min(num_tokens, (chunk + 1) * kPrepareRows);
    for (int64_t t = chunk * kPrepareRows; t < end; ++t)
      linear.prepare_row(x + t * linear.in_features, norm_weight, norm_eps, prepared.data() + t * row_bytes);
  });
  const bool gated = epilogue.gate != GateActivation::kNone;
  const size_t scratch_bytes = (linear.scratch_bytes(num_tokens, gated) + 63) / 64 * 64;
  const AlignedBuffer scratch(scratch_bytes * num_threads);
  parallel_for(linear.num_chunks(num_tokens, gated), num_threads, [&](int64_t chunk, int worker_idx) {
    linear.run_chunk(prepared.data(), num_tokens, epilogue, chunk, chunk + 1,
                     scratch.data() + worker_idx * scratch_bytes);
  });
}

double time_linear(const std::vector<const PackedLinear*>& linears, int64_t num_tokens, int64_t iterations,
                   int num_threads, GateActivation gate) {
  PARTITA_CHECK(!linears.empty(), "linears: got none, wanted at least one");
  PARTITA_CHECK(num_tokens > 0, "num_tokens: got ", num_tokens, ", wanted a positive number");
  PARTITA_CHECK(iterations > 0, "iterations: got ", iterations, ", wanted a positive number");
  if (num_threads <= 0) num_threads = usable_cores();
  const PackedLinear& first = *linears[0];
  for (const PackedLinear* linear : linears)
    PARTITA_CHECK(linear->in_features == first.in_features && linear->out_features == first.out_features &&
                      linear->kernel == first.kernel,
                  "linears: got different shapes or kernels, wanted copies of one linear");
  const bool gated = gate != GateActivation::kNone;
  const int64_t num_outputs = gated ? first.out_features / 2 : first.out_features;
  const size_t row_bytes = first.prepared_row_bytes();
  const AlignedBuffer prepared(row_bytes * num_tokens);
  const std::vector<float> x = random_rows(num_tokens * first.in_features);
  for (int64_t t = 0; t < num_tokens; ++t)
    first.prepare_row(x.data() + t * first.in_features, nullptr, 0.0f, prepared.data() + t * row_bytes);
  std::vector<float> out(num_tokens * num_outputs);
  LinearEpilogue epilogue;
  epilogue.out = out.data();
  epilogue.out_stride = num_outputs;
  epilogue.gate = gate;
  const size_t scratch_bytes = (first.scratch_bytes(num_tokens, gated) + 63) / 64 * 64;
  const AlignedBuffer scratch(scratch_bytes * num_threads);
  const int64_t num_chunks = first.num_chunks(num_tokens, gated);

  // Claimed as a lane's workers claim them; a worker enters iteration i + 1 when all chunks of i are done.
  std::vector<ChunkRun> runs(iterations * num_threads);
  for (int64_t i = 0; i < iterations; ++i) open_runs(runs.data() + i * num_threads, num_threads, num_chunks);
  std::atomic<int64_t> done_chunks{0};
  std::atomic<int> ready{0};
  auto work = [&](int worker_idx) {
    ready.fetch_add(1);
    while (ready.load() < num_threads) std::this_thread::yield();
    for (int64_t i = 0; i < iterations; ++i) {
      for (int spins = 0; done_chunks.load(std::memory_order_acquire) < i * num_chunks; ++spins)
        if (spins > 2000) std::this_thread::yield();
      const PackedLinear& linear = *linears[i % linears.size()];
      for (ClaimedChunk claimed; claim_chunk(runs.data() + i * num_threads, num_threads, worker_idx, &claimed);) {
        linear.run_chunk(prepared.data(), num_tokens, epilogue, claimed.chunk, claimed.run_end,
                         scratch.data() + worker_idx * scratch_bytes);
        done_chunks.fetch_add(1, std::memory_order_release);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, i);
  while (ready.load() < num_threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  work(0);
  for (std::thread& thread : threads) thread.join();
  return seconds_since(start);
}

double time_prepare_rows(const PackedLinear& linear, int64_t num_tokens, int64_t iterations) {
  PARTITA_CHECK(num_tokens > 0, "num_tokens: got ", num_tokens, ", wanted a positive number");
  const size_t row_bytes = linear.prepared_row_bytes();
  const AlignedBuffer prepared(row_bytes * num_tokens);
  const std::vector<float> x = random_rows(num_tokens * linear.in_features);
  const std::vector<float> norm_weight(linear.in_features, 1.0f);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < iterations; ++i)
    for (int64_t t = 0; t < num_tokens; ++t)
      linear.prepare_row(x.data() + t * linear.in_features, norm_weight.data(), 1e-5f, prepared.data() + t * row_bytes);
  return seconds_since(start);
}

}  // namespace partita
