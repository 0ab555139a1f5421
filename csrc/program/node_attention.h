// Paged attention as a node: append the step's K and V to their pages, then attend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "program/program.h"
#include "rope/rope.h"

namespace partita {

struct AttentionNode {
  int group = 0;  // KV group
  int layer_in_group = 0;
  int plan = 0;          // Program::add_attention_plan
  KvGroupLayout layout;  // of the group, as the arena has it
  int num_q_heads = 0;
  std::shared_ptr<const RopeTableStorage> rope;     // null: no rotation
  std::vector<float> q_norm_weight, k_norm_weight;  // [D] or empty
  float norm_eps = 1e-6f;
  float scale = 0;
  float soft_cap = 0;
  bool exact = false;
  BufferId qkv = kNoBuffer;     // [T, (Hq + 2 Hkv) * D] fp32; on a GPU of any float type
  BufferId output = kNoBuffer;  // [T, Hq * D] fp32
};

// Throws ValueError unless the node fits its layout and rows of so many elements.
void check_attention_node(const AttentionNode& node, int64_t qkv_width, int64_t output_width);
std::string attention_detail(const AttentionNode& node);
ResourceClass attention_class(const StepShape& shape);
// row_bytes: of one token's rows, in and out.
NodeCost attention_cost(const AttentionNode& node, const StepShape& shape, int64_t row_bytes);

class AttentionOp final : public CpuOp {
 public:
  AttentionOp(AttentionNode node, int64_t qkv_stride, int64_t output_stride);

  const char* kind() const override { return "attention"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape& shape) const override { return attention_class(shape); }
  NodeCost cost(const StepShape& shape) const override;
  int num_phases() const override { return 2; }
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  AttentionParams params(const CpuFrame& frame) const;

  AttentionNode node_;
  int64_t qkv_stride_;
  int64_t output_stride_;
  RopeTable rope_view_;
};

}  // namespace partita
