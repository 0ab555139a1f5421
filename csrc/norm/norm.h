// RMS norm over the rows of a step: the contract of this folder. See rms_norm_row.h for one row.
#pragma once

#include <cstdint>

namespace partita {

struct RmsNormParams {
  int64_t num_tokens = 0;         // T
  int64_t hidden = 0;             // H
  const float* in = nullptr;      // [T, H]
  int64_t in_stride = 0;          // floats between tokens
  const float* weight = nullptr;  // [H]
  float eps = 1e-6f;
  float* out = nullptr;     // [T, H]; may be `in` unless add_to_out
  int64_t out_stride = 0;   // floats
  bool add_to_out = false;  // out += norm(in): a post-norm added to the residual
};

// Throws ValueError that names the field: null pointer, hidden < 1, stride < hidden, eps not finite or negative.
void norm_check(const RmsNormParams& params);

// Chunks are runs of whole rows, of a length that depends on `hidden` alone; any order, any worker.
int64_t norm_num_chunks(const RmsNormParams& params);
void norm_run_chunk(const RmsNormParams& params, int64_t chunk);

}  // namespace partita
