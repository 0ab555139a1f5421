// What the sampling kernels are launched with: the call's arguments, how a row is cut up, and the workspace's pieces.
// Shared by the host (sampling_gpu.cpp) and the kernels (cuda/*.cu).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernel_registry.h"
#include "sampling/sampling_gpu.h"

namespace partita {

// A row is cut into segments, one per warp; kSamplingWarps consecutive segments are one block's *split* of the row.
constexpr int kSamplingThreads = 512;
constexpr int kSamplingWarps = kSamplingThreads / 32;
constexpr int kMaxSplits = 16;
constexpr int kMaxSegments = kMaxSplits * kSamplingWarps;
constexpr int kSegmentUnit = 128;          // segment lengths are multiples: a warp reads 128 logits at a time
constexpr int64_t kMinSplitLogits = 4096;  // a row is not cut finer than that
constexpr int kListCapacity = 4096;        // candidates that are taken out of a row; more: the row itself is read again
constexpr int kNumSamplingBins = 2048;     // of every histogram
constexpr int kTokenIdBits = 20;           // of kMaxGpuVocabSize

// One logit with its token; id -1: none.
struct Candidate {
  float logit;
  int32_t id;
};

// A logit that bias, penalties or masks changed, with what it was.
struct GpuTouchedLogit {
  int32_t token;
  float raw;
  uint32_t slot;  // of the history table
};

// Open addressing; all zero between calls.
struct HistorySlot {
  uint32_t token_plus_one;
  uint32_t num_seen;  // generated occurrences; the high bit: it also occurs in the prompt
};

// What the blocks of a row's next kernel have to do with their splits.
enum class RowTask : int32_t {
  kNone,       // the token is there
  kSum,        // no cut but min_p: sum the weights of each segment, then draw
  kCollect,    // top_k: list what reaches the bound, then cut and draw among that
  kHistogram,  // top_p: weights by logit, to find the bin of the cut
  kSplitBin,   // top_p: list that bin, sum what lies above it, then cut and draw
  kWhole       // a cut with neither bound nor bin: the last block reads the row
};

struct RowProgress {
  float max;    // of the logits as adjusted; later of the raw ones
  float bound;  // kCollect
  RowTask task;
  int32_t cut_bin;  // kSplitBin
  uint64_t above;   // kSplitBin: the weight above that bin
  uint64_t target;  // kSplitBin: the weight to be reached
};

struct SamplingWorkspaceLayout {
  // Zero between calls; kept apart by max_logit_rows, so that calls of any size agree where they lie.
  uint32_t* tickets;     // [R] blocks of the row that are done
  uint32_t* list_sizes;  // [R]
  HistorySlot* history;  // [R, table_size]
  // Written before they are read in each call.
  RowProgress* progress;     // [R]
  uint64_t* best;            // [R * splits] largest logit and lowest id as one number
  Candidate* maxima;         // [R * splits, kSamplingThreads] the largest logit each thread saw
  uint64_t* segment_sums;    // [R * splits, kSamplingWarps]
  uint32_t* segment_counts;  // [R * splits, kSamplingWarps]
  uint64_t* histograms;      // [R * splits, kNumSamplingBins]
  Candidate* lists;          // [R, kListCapacity]
  uint32_t* num_touched;     // [R]
  GpuTouchedLogit* touched;  // [R, max_touched]
  int64_t table_size;        // a power of two
  int32_t table_shift;       // 32 - log2(table_size)
  int64_t max_touched;
};

struct SamplingLaunch {
  SampleGpuParams call;
  SamplingWorkspaceLayout workspace;
  int32_t num_splits;
  int32_t segment_length;
};

// The steps of sample_gpu in order; scan runs again over the raw logits of rows that ask for log probabilities, weigh
// twice: only a top_p cut needs the second.
struct SamplingAdjustKernel {
  static constexpr const char* kFamily = "sampling_adjust";
  KernelInfo info;
  void (*launch)(const SamplingLaunch& launch, void* stream);
};

struct SamplingScanKernel {
  static constexpr const char* kFamily = "sampling_scan";
  KernelInfo info;
  void (*launch)(const SamplingLaunch& launch, bool is_raw, void* stream);
};

struct SamplingWeighKernel {
  static constexpr const char* kFamily = "sampling_weigh";
  KernelInfo info;
  void (*launch)(const SamplingLaunch& launch, void* stream);
};

struct SamplingLogprobsKernel {
  static constexpr const char* kFamily = "sampling_logprobs";
  KernelInfo info;
  void (*launch)(const SamplingLaunch& launch, void* stream);
};

struct ScoreKernel {
  static constexpr const char* kFamily = "score";
  KernelInfo info;
  void (*launch)(const ScoreGpuParams& params, void* stream);
};

struct SoftCapKernel {
  static constexpr const char* kFamily = "soft_cap";
  KernelInfo info;
  void (*launch)(const SoftCapGpuParams& params, void* stream);
};

}  // namespace partita
