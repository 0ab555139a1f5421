// Nodes that move rows on a GPU: page copies, embedding lookup, post-norm-and-add, gathering the rows that get logits.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "embedding/embedding_gpu.h"
#include "program/gpu_run.h"
#include "program/program.h"

namespace partita {

// Copy-on-write: the step's page copies, before anything reads or writes a page.
class GpuCopyPagesOp final : public GpuOp {
 public:
  const char* kind() const override { return "copy_pages"; }
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape&) const override { return {}; }
  bool has_work(const GpuRun& run) const override { return run.num_copies > 0; }
  void launch(const GpuRun& run) const override;
};

// Token ids -> hidden rows. The ids come from the device's rows when the kernel runs. A frame's input_embeddings
// replace the lookup.
class GpuEmbeddingOp final : public GpuOp {
 public:
  // token_ids: a buffer [T, 1] int32; output: [T, H] fp32.
  GpuEmbeddingOp(const Program& program, const Weight& table, float scale, BufferId token_ids, BufferId output);

  const char* kind() const override { return "embedding"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  bool has_work(const GpuRun& run) const override { return !run.has_input_embeddings; }
  void launch(const GpuRun& run) const override;

 private:
  GpuEmbeddingTable table_;
  float scale_;
  BufferId token_ids_;
  BufferId output_;
  int64_t output_stride_;
};

// residual += rms_norm(branch): models that normalise what a block adds (Gemma 3).
class GpuNormAddOp final : public GpuOp {
 public:
  GpuNormAddOp(const Program& program, const std::vector<float>& weight, float eps, BufferId branch, BufferId residual);

  const char* kind() const override { return "norm_add"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  void launch(const GpuRun& run) const override;

 private:
  int64_t width_;
  GpuBuffer weight_;
  float eps_;
  BufferId branch_, residual_;
  BufferSpec branch_spec_, residual_spec_;
};

// Hidden rows of the tokens whose logits are wanted.  [T, H] -> [S, H] fp32
class GpuGatherLogitRowsOp final : public GpuOp {
 public:
  GpuGatherLogitRowsOp(int64_t width, BufferId input, BufferId output)
      : width_(width), input_(input), output_(output) {}

  const char* kind() const override { return "gather_logit_rows"; }
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  bool has_work(const GpuRun& run) const override { return run.num_logit_rows > 0; }
  void launch(const GpuRun& run) const override;

 private:
  int64_t width_;
  BufferId input_, output_;
};

}  // namespace partita
