// A frame on a GPU: inputs staged in pinned memory, activations in device memory of its own, results copied back.
#pragma once

#include <memory>
#include <vector>

#include "program/frame.h"
#include "program/gpu_run.h"

namespace partita {

class GpuFrame final : public Frame {
 public:
  GpuFrame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena, std::shared_ptr<RowStore> rows,
           int64_t max_tokens, int64_t max_logit_rows);

  // Device memory that one such frame takes, to the byte; graph_rows > 0: what a lane's decode graphs take instead.
  static size_t device_bytes(const Program& program, const GpuStepLimits& limits) {
    return GpuFrameMemory::bytes(program, limits);
  }
  static GpuStepLimits step_limits(const Program& program, int num_rows, int64_t max_context, int num_groups,
                                   int page_size, int64_t max_tokens, int64_t max_logit_rows);

  // Float buffers of any type, read back from where the last run left them; waits for the device.
  void read_buffer(BufferId id, float* out) const override;

  // ---- the lane's, in this order; see GpuLane
  // Every row decodes one token, samples it, and nothing else is asked: what a captured graph can do.
  bool is_plain_decode() const;
  GpuSamplingFeatures features() const { return features_; }
  // Bytes of pages that a plain step reads less often than a graph would, because requests that follow each other in it
  // begin with the same pages and its attention reads those once for all of them.
  double shared_prefix_bytes() const { return shared_prefix_bytes_; }
  int num_shared_prefixes() const { return num_shared_prefixes_; }
  // Fills the staging block for a run in `memory` (null: its own), over `graph_rows` rows where that is more than 0,
  // and returns what the ops launch with.
  GpuRun stage(std::shared_ptr<GpuFrameMemory> memory, int graph_rows, GpuStream stream, int num_ctas);
  // The run as staged last, for a later range of the same step.
  GpuRun resume(GpuStream stream, int num_ctas) const;
  // Enqueues rows of the step that were admitted since a step last named them, then the staged inputs.
  void upload(const GpuRun& run);
  // Enqueues the copy of what sampling leaves; take_results() reads it when the stream has come so far.
  void download_results(const GpuRun& run);
  void take_results();

 private:
  void build_step() override;
  void find_shared_prefixes();
  GpuPlanOptions plan_options(int num_ctas, int graph_rows) const;

  std::shared_ptr<Gpu> gpu_;
  GpuStepLimits limits_;
  std::shared_ptr<GpuFrameMemory> own_memory_;
  std::shared_ptr<GpuFrameMemory> memory_;  // of the staged run
  GpuPinnedBuffer staging_, results_;
  std::vector<GpuAttentionPlan> plans_;
  std::unique_ptr<GpuStepLayout> layout_;
  GpuRun run_;
  GpuSamplingFeatures features_;
  std::vector<std::vector<GpuSharedPrefix>> shared_prefixes_;  // [groups]
  double shared_prefix_bytes_ = 0;
  int num_shared_prefixes_ = 0;
  bool wants_top_ = false;
  bool has_results_ = false;
};

}  // namespace partita
