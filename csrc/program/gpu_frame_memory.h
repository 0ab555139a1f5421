// The device memory that runs of one program use, one run at a time: inputs, activations, workspaces, results. Each
// frame has one of its own; a lane has one more that its captured decode graphs run in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/attention_gpu.h"
#include "program/gpu_step_layout.h"
#include "program/program.h"
#include "sampling/sampling_gpu.h"

namespace partita {

// The largest step that the memory must hold.
struct GpuStepLimits {
  int64_t max_tokens = 0;
  int64_t max_logit_rows = 0;
  int64_t max_requests = 0;
  int64_t max_context = 0;  // positions of a request
  int page_size = 0;
  int graph_rows = 0;  // > 0: only decode graphs of up to this many rows run in it

  int num_groups = 0;  // KV groups
  bool is_batch_invariant = false;

  int64_t max_copies() const { return max_requests * num_groups; }  // of pages, in one step
  int64_t max_pages() const { return (max_context + page_size - 1) / page_size; }
};

// What sampling leaves for the host, in one block: tokens, ranks and log probabilities first, so that a step that wants
// no alternatives copies only those.
struct GpuResultLayout {
  explicit GpuResultLayout(int64_t num_logit_rows);

  int64_t tokens, ranks;      // [S] int32
  int64_t logprobs;           // [S] fp32: the sampled token's, or the score of a score_all step
  int64_t bytes_without_top;  // of the three above
  int64_t top_ids;            // [S, kMaxTopLogprobs] int32
  int64_t top_logprobs;       // [S, kMaxTopLogprobs] fp32
  int64_t num_bytes;
};

class GpuFrameMemory {
 public:
  // Throws RuntimeError when the device has not that much memory.
  GpuFrameMemory(const Program& program, const GpuStepLimits& limits);

  // What the constructor will take, to the byte.
  static size_t bytes(const Program& program, const GpuStepLimits& limits);

  const GpuStepLimits& limits() const { return limits_; }
  std::byte* inputs() const { return inputs_.data(); }
  size_t input_bytes() const { return inputs_.bytes(); }
  std::byte* buffer(BufferId id) const { return memory_.data() + places_.buffers[id]; }
  // Of the nodes whose GpuOp::workspace_key() this is.
  std::byte* workspace(const std::string& key) const;
  std::byte* attention_workspace() const { return memory_.data() + places_.attention_workspace; }
  std::byte* results() const { return results_.data(); }
  const GpuResultLayout& result_layout() const { return result_layout_; }

 private:
  // Offsets of what lies in memory_, and its size.
  struct Places {
    Places(const Program& program, const GpuStepLimits& limits);

    std::vector<size_t> buffers;                             // as in Program::buffers
    std::vector<std::pair<std::string, size_t>> workspaces;  // by key
    size_t attention_workspace = 0;
    size_t num_bytes = 0;
    size_t input_bytes = 0;
  };

  GpuStepLimits limits_;
  GpuResultLayout result_layout_;
  Places places_;
  GpuBuffer inputs_, results_;
  GpuBuffer memory_;  // buffers and workspaces
};

// One plan for each of Program::attention_plans.
std::vector<GpuAttentionPlan> make_attention_plans(const Program& program);

// 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128 ... up to `most`, which is always one.
std::vector<int> decode_buckets(int most);

}  // namespace partita
