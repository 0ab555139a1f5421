// Paged attention as a node on a GPU: append the step's K and V to their pages, then attend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program/gpu_run.h"
#include "program/node_attention.h"
#include "program/program.h"

namespace partita {

// A model's rotary table in device memory, shared by its layers.
class GpuRopeStorage {
 public:
  GpuRopeStorage(const std::shared_ptr<Gpu>& gpu, const RopeTableStorage& host);
  const GpuRopeTable& table() const { return table_; }

 private:
  GpuBuffer cos_, sin_;
  GpuRopeTable table_;
};

class GpuAttentionOp final : public GpuOp {
 public:
  // node.rope is not looked at: `rope` is its device copy, or null.
  GpuAttentionOp(const Program& program, AttentionNode node, std::shared_ptr<const GpuRopeStorage> rope);

  const char* kind() const override { return "attention"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape& shape) const override { return attention_class(shape); }
  NodeCost cost(const StepShape& shape) const override;
  void launch(const GpuRun& run) const override;

 private:
  AttentionNode node_;
  BufferSpec qkv_, output_;
  std::shared_ptr<const GpuRopeStorage> rope_;
  GpuBuffer q_norm_weight_, k_norm_weight_;
};

}  // namespace partita
