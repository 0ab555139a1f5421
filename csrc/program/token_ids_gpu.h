// Token ids of a step, read from the device's rows when the kernel runs: so a step can be prepared, and its launches
// queued, before the token that it starts from is known.
#pragma once

#include <cstdint>

#include "core/kernel_registry.h"

namespace partita {

struct TokenIdsParams {
  int64_t num_tokens = 0;                    // T
  const int32_t* token_rows = nullptr;       // [T] row of each token, -1: padding
  const int32_t* token_positions = nullptr;  // [T]
  const int32_t* tokens = nullptr;           // [num_rows, stride]
  int64_t tokens_stride = 0;
  int32_t* token_ids = nullptr;  // [T] -1 where padding, or where nothing could be sampled
};

struct TokenIdsKernel {
  static constexpr const char* kFamily = "token_ids";
  KernelInfo info;
  void (*launch)(const TokenIdsParams& params, void* stream);
};

}  // namespace partita
