// The last nodes on a GPU: the cap some models put on their logits, and a token for each sampling row, or the log
// probability of each scheduled token's successor.
#pragma once

#include <string>

#include "program/gpu_run.h"
#include "program/program.h"

namespace partita {

// The sampled token becomes the row's next known token on the device at once, so the next step's embedding finds it.
class GpuSamplingOp final : public GpuOp {
 public:
  GpuSamplingOp(const Program& program, BufferId logits);

  const char* kind() const override { return "sampling"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  bool has_work(const GpuRun& run) const override { return run.num_logit_rows > 0; }
  void launch(const GpuRun& run) const override;
  size_t workspace_bytes(const GpuStepLimits& limits) const override;

 private:
  std::shared_ptr<Gpu> gpu_;
  int64_t vocab_size_;
  BufferId logits_;
};

// logits = cap * tanh(logits / cap), in place.
class GpuSoftCapOp final : public GpuOp {
 public:
  GpuSoftCapOp(const Program& program, float cap, BufferId logits);

  const char* kind() const override { return "soft_cap"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  bool has_work(const GpuRun& run) const override { return run.num_logit_rows > 0; }
  void launch(const GpuRun& run) const override;

 private:
  int64_t vocab_size_;
  float cap_;
  BufferId logits_;
};

}  // namespace partita
