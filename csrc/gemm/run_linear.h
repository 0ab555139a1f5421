// A packed linear run on its own, outside a program: what bindings, tests and kernel benches use.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm/gemm.h"

namespace partita {

// Prepares each row of x and runs all chunks on num_threads threads.
// x: [T, in_features]  norm_weight: [in_features] or null
void run_linear(const PackedLinear& linear, const float* x, int64_t num_tokens, const float* norm_weight,
                float norm_eps, const LinearEpilogue& epilogue, int num_threads);

// Seconds that `iterations` runs take over prepared random rows, on threads that live for the whole call and claim
// chunks as a lane's workers do. Run i uses linears[i % size]: several copies defeat the caches. Preparing the rows
// is not timed.
double time_linear(const std::vector<const PackedLinear*>& linears, int64_t num_tokens, int64_t iterations,
                   int num_threads, GateActivation gate);

// Seconds of preparing `num_tokens` random rows `iterations` times on one thread, with an RMS norm.
double time_prepare_rows(const PackedLinear& linear, int64_t num_tokens, int64_t iterations);

}  // namespace partita
