// logit_bias, min_tokens and penalties, in place; what they change is remembered and put back by finish_row.
//
// One block a row. A hash table counts the history, so that each token is penalised once however often it occurs:
// O(history + bias), never O(V). A token's slot is taken by one thread, which reads the raw logit before anything
// changes it: values do not depend on the order of threads, only the order of the touched list does.
#include <cstdint>

#include "sampling/cuda/logit_order.cuh"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

constexpr uint32_t kInPrompt = 0x80000000u;

// Inserts the token if it is not there. The thread that finds it absent has `is_first`.
struct HistoryPlace {
  uint32_t slot;
  bool is_first;
};
__device__ __forceinline__ HistoryPlace place_in_history(const SamplingLaunch& launch, HistorySlot* table, int token) {
  const auto mask = static_cast<uint32_t>(launch.workspace.table_size - 1);
  const uint32_t wanted = static_cast<uint32_t>(token) + 1;
  uint32_t slot = static_cast<uint32_t>(token) * 2654435769u >> launch.workspace.table_shift;  // 2^32 / golden ratio
  while (true) {
    uint32_t found = load_4(&table[slot].token_plus_one);
    if (found == 0) {
      found = atomicCAS(&table[slot].token_plus_one, 0u, wanted);
      if (found == 0) return {slot, true};
    }
    if (found == wanted) return {slot, false};
    slot = (slot + 1) & mask;
  }
}

struct AdjustStorage {
  uint32_t num_touched;
};

__global__ void __launch_bounds__(kSamplingThreads) adjust_logits(const __grid_constant__ SamplingLaunch launch) {
  AdjustStorage& storage = dynamic_shared<AdjustStorage>();
  const SampleGpuParams& call = launch.call;
  const int logit_row = static_cast<int>(blockIdx.x);
  const int row = call.logit_rows[logit_row];
  if (row < 0) return;
  const std::byte* record = call.rows.records + row * call.rows.record_bytes;
  const GpuSamplingRow& params = *reinterpret_cast<const GpuSamplingRow*>(record);
  const bool repeats = params.repetition_penalty != 1.0f;
  const bool counts = params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
  int64_t num_tokens = call.num_tokens[logit_row];
  const bool masks = num_tokens - params.num_prompt_tokens < params.min_tokens;
  if (!repeats && !counts && !masks && params.num_logit_biases == 0) {
    if (threadIdx.x == 0) launch.workspace.num_touched[logit_row] = 0;
    return;
  }

  float* logits = call.logits + logit_row * call.logits_stride;
  HistorySlot* table = launch.workspace.history + logit_row * launch.workspace.table_size;
  GpuTouchedLogit* touched = launch.workspace.touched + logit_row * launch.workspace.max_touched;
  if (threadIdx.x == 0) storage.num_touched = 0;
  __syncthreads();
  const auto touch = [&](int token) {
    const HistoryPlace place = place_in_history(launch, table, token);
    if (place.is_first) touched[atomicAdd(&storage.num_touched, 1u)] = {token, logits[token], place.slot};
    return place.slot;
  };

  const auto* biases = reinterpret_cast<const GpuLogitBias*>(record + call.rows.logit_bias_offset);
  for (int i = threadIdx.x; i < params.num_logit_biases; i += kSamplingThreads) {
    const int token = biases[i].token;
    if (i > 0 && biases[i - 1].token == token) continue;  // the first of a token's biases adds them all
    touch(token);
    float logit = logits[token];
    for (int j = i; j < params.num_logit_biases && biases[j].token == token; ++j) logit += biases[j].bias;
    logits[token] = logit;
  }
  __syncthreads();  // orders global memory only
  if (masks) {
    const auto* stop_token_ids = reinterpret_cast<const int32_t*>(record + call.rows.stop_token_ids_offset);
    for (int i = threadIdx.x; i < params.num_stop_token_ids; i += kSamplingThreads) {
      const int token = stop_token_ids[i];
      touch(token);
      // NaN and +infinity stay, so that the row is still seen to be broken.
      if (!is_broken(logits[token])) logits[token] = kMinusInfinity;
    }
  }
  __syncthreads();  // orders global memory only

  if (repeats || counts) {
    const int64_t last_token =
        call.tokens_stride < launch.call.workspace.max_tokens ? call.tokens_stride : launch.call.workspace.max_tokens;
    if (num_tokens > last_token) num_tokens = last_token;
    const int32_t* tokens = call.tokens + row * call.tokens_stride;
    for (int64_t i = (repeats ? 0 : params.num_prompt_tokens) + threadIdx.x; i < num_tokens; i += kSamplingThreads) {
      const int token = tokens[i];
      if (token < 0 || token >= call.vocab_size) continue;
      const uint32_t slot = touch(token);
      if (i < params.num_prompt_tokens)
        atomicOr(&table[slot].num_seen, kInPrompt);
      else
        atomicAdd(&table[slot].num_seen, 1u);
    }
    __syncthreads();
  }

  const uint32_t num_touched = storage.num_touched;
  for (uint32_t i = threadIdx.x; i < num_touched; i += kSamplingThreads) {
    const GpuTouchedLogit entry = touched[i];
    const uint32_t num_seen = table[entry.slot].num_seen;
    table[entry.slot] = {0, 0};
    if (num_seen == 0) continue;
    float logit = logits[entry.token];
    if (repeats) logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    const uint32_t num_generated = num_seen & ~kInPrompt;
    if (num_generated > 0)
      logit -= params.presence_penalty + __fmul_rn(params.frequency_penalty, static_cast<float>(num_generated));
    logits[entry.token] = logit;
  }
  if (threadIdx.x == 0) launch.workspace.num_touched[logit_row] = num_touched;
}

void launch_adjust(const SamplingLaunch& launch, void* stream) {
  device::launch("adjust_logits", adjust_logits, {static_cast<unsigned>(launch.call.num_logit_rows)},
                 {kSamplingThreads}, sizeof(AdjustStorage), stream, launch);
}

const KernelRegistration<SamplingAdjustKernel> kRegistered({{"sampling_adjust", ""}, &launch_adjust});

}  // namespace
}  // namespace device
}  // namespace partita
