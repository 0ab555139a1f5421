// Sampling on a GPU: the contract. The semantics are those of sampling/sampling.h, row by row; every sum of weights is
// an exact integer, so a row's token depends neither on the batch nor on how its logits are split over blocks.
//
// Everything here only enqueues on the stream, and the grids depend on (number of logit rows, vocabulary, features)
// alone: all of it can be captured in a graph, which then serves any batch of that many rows, padded or not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/gpu.h"
#include "sampling/sampling.h"

namespace partita {

constexpr int kMaxTopLogprobs = 32;                     // SamplingParams::num_logprobs on a GPU
constexpr int64_t kMaxGpuVocabSize = int64_t{1} << 20;  // token ids and exact sums of weights share 64-bit words

// What the kernels read of one row's SamplingParams; the head of its record.
struct GpuSamplingRow {
  float inverse_temperature;
  float top_p;           // 1: none
  float min_p;           // 0: none
  float bins_per_logit;  // of the histogram in which the top_p cut is looked for
  float presence_penalty;
  float frequency_penalty;
  float repetition_penalty;
  int32_t is_greedy;
  uint64_t seed;
  int64_t num_prompt_tokens;
  int32_t top_k;  // 0: none
  int32_t num_logprobs;
  int32_t min_tokens;
  int32_t num_stop_token_ids;
  int32_t num_logit_biases;
  int32_t reserved;
};

// Sorted by token, so that the biases of one token are added by one thread, in the order in which they were given.
struct GpuLogitBias {
  int32_t token;
  float bias;
};

// Records of all rows as the kernels see them: GpuSamplingRow, then stop ids, then biases.
struct GpuSamplingRowsView {
  const std::byte* records;  // [num_rows] device
  int64_t record_bytes;
  int64_t stop_token_ids_offset;  // bytes into the record
  int64_t logit_bias_offset;
};

struct GpuSamplingCapacity {
  int max_stop_token_ids = 64;
  int max_logit_biases = 512;
};

// The device mirror of every row's sampling parameters, filled at admission.
//
// Owns the records on the device and pinned copies that they are uploaded from. One thread at a time.
class GpuSamplingRows {
 public:
  GpuSamplingRows(std::shared_ptr<Gpu> gpu, int num_rows, int64_t vocab_size, const GpuSamplingCapacity& capacity = {});
  ~GpuSamplingRows();
  GpuSamplingRows(const GpuSamplingRows&) = delete;
  GpuSamplingRows& operator=(const GpuSamplingRows&) = delete;

  // Enqueues the upload; no step that names the row may be in flight.
  // Throws ValueError naming the field: params.check(), more stop ids, biases or logprobs than fit.
  void set(int row, const SamplingParams& params, int64_t num_prompt_tokens, GpuStream stream);

  const GpuSamplingRowsView& view() const { return view_; }
  const GpuSamplingCapacity& capacity() const { return capacity_; }
  int num_rows() const { return num_rows_; }

 private:
  std::shared_ptr<Gpu> gpu_;
  int num_rows_;
  int64_t vocab_size_;
  GpuSamplingCapacity capacity_;
  GpuSamplingRowsView view_;
  GpuBuffer records_;
  std::byte* staging_ = nullptr;  // pinned, laid out as the records
};

// What any row of a step may ask for. Kernels of features that are left out are not launched: a row must then not ask
// for it. A caller that captures graphs captures one with all, or one for each combination it wants to be quick.
struct GpuSamplingFeatures {
  bool adjusts = true;   // logit_bias, min_tokens, penalties
  bool draws = true;     // rows that are not greedy
  bool logprobs = true;  // num_logprobs >= 0

  static GpuSamplingFeatures of(const SamplingParams& params);
  GpuSamplingFeatures operator|(const GpuSamplingFeatures& other) const {
    return {adjusts || other.adjusts, draws || other.draws, logprobs || other.logprobs};
  }
};

// Device memory for one sample_gpu call at a time (one per lane). Its counters and tables are zero between calls.
struct GpuSamplingWorkspace {
  std::byte* data = nullptr;  // sample_gpu_workspace_bytes(), 256-byte aligned, filled with zeroes once by the caller
  int max_logit_rows = 0;     // as given to sample_gpu_workspace_bytes()
  int64_t max_tokens = 0;
};

// max_logit_rows: most logit rows of a call; max_tokens: the longest history.
size_t sample_gpu_workspace_bytes(const Gpu& gpu, int max_logit_rows, int64_t vocab_size, int64_t max_tokens,
                                  const GpuSamplingCapacity& capacity);

struct SampleGpuParams {
  int num_logit_rows = 0;   // S
  int64_t vocab_size = 0;   // V
  float* logits = nullptr;  // [S, V] fp32, adjusted during the call and put back
  int64_t logits_stride = 0;
  const int32_t* logit_rows = nullptr;  // [S] row of each, -1: padded, skipped
  const int32_t* num_tokens = nullptr;  // [S] known tokens of that row, prompt and generated
  int32_t* tokens = nullptr;            // [num_rows, stride] history; the sampled token becomes [row][num_tokens]
  int64_t tokens_stride = 0;            // num_tokens < tokens_stride
  GpuSamplingRowsView rows{};
  GpuSamplingCapacity capacity{};
  GpuSamplingFeatures features{};
  GpuSamplingWorkspace workspace{};

  int32_t* sampled = nullptr;  // [S] -1: the logits held a NaN, +infinity or no finite value; a padded row's stays
  // Of rows that ask for logprobs and have a token; else left as they were. May be null where features.logprobs is off.
  float* logprobs = nullptr;      // [S]
  int32_t* ranks = nullptr;       // [S] 1 + number of larger raw logits
  int32_t* top_ids = nullptr;     // [S, kMaxTopLogprobs], the row's num_logprobs most likely ones, descending
  float* top_logprobs = nullptr;  // [S, kMaxTopLogprobs]
};

void sample_gpu(Gpu& gpu, const SampleGpuParams& params, GpuStream stream);

// scores[s] = log softmax(logits[s])[tokens[row][num_tokens[s]]], the log probability of the known successor of each
// scheduled token; NaN where that is no id of the vocabulary.
struct ScoreGpuParams {
  int num_logit_rows = 0;
  int64_t vocab_size = 0;
  const float* logits = nullptr;  // [S, V]
  int64_t logits_stride = 0;
  const int32_t* logit_rows = nullptr;  // [S] -1: padded, its score stays
  const int32_t* num_tokens = nullptr;  // [S] position of the successor: one more than the scheduled token's
  const int32_t* tokens = nullptr;      // [num_rows, stride]
  int64_t tokens_stride = 0;
  float* scores = nullptr;  // [S]
};

void score_gpu(Gpu& gpu, const ScoreGpuParams& params, GpuStream stream);

struct SoftCapGpuParams {
  int num_logit_rows = 0;
  int64_t vocab_size = 0;
  float* logits = nullptr;  // [S, V], in place: cap * tanh(logits / cap)
  int64_t logits_stride = 0;
  float cap = 0;
};

void soft_cap_gpu(Gpu& gpu, const SoftCapGpuParams& params, GpuStream stream);

}  // namespace partita
