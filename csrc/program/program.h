// A model's forward pass, recorded once: nodes in order, the buffers between them. Immutable after seal().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "core/dtype.h"
#include "core/gpu.h"
#include "program/op.h"

namespace partita {

using BufferId = int32_t;
constexpr BufferId kNoBuffer = -1;

// What the rows of a buffer stand for.
enum class RowKind { kToken, kLogitRow };

struct BufferSpec {
  std::string name;
  RowKind rows = RowKind::kToken;
  int64_t width = 0;  // elements of a row
  DType dtype = DType::kF32;

  int64_t row_bytes() const { return width * static_cast<int64_t>(dtype_bytes(dtype)); }
};

struct Node {
  std::string name;  // "layers.3.attention"
  int layer = -1;    // -1: outside the layers
  std::unique_ptr<Op> op;
  const CpuOp* cpu_op = nullptr;  // the op, on the program's device; the other is null
  const GpuOp* gpu_op = nullptr;
  std::vector<BufferId> reads;
  std::vector<BufferId> writes;
  std::vector<BufferId> live_after;  // buffers that a frame resting after this node must keep
};

// What attention nodes share: the step's plan over one KV group for so many query heads.
struct ProgramAttention {
  int group = 0;
  int num_q_heads = 0;
  KvGroupLayout layout;  // of the group, as the arena has it
  DType qkv_type = DType::kF32;
  bool exact = false;
};

class Program {
 public:
  // gpu: where its nodes run; null: on the CPU, which is always batch invariant. is_batch_invariant: on a GPU, whether
  // a token's result must not depend on what else is in its step.
  explicit Program(std::shared_ptr<Gpu> gpu = nullptr, bool is_batch_invariant = false)
      : gpu_(std::move(gpu)), is_batch_invariant_(is_batch_invariant) {}

  BufferId add_buffer(std::string name, RowKind rows, int64_t width, DType dtype);
  // Appends a node; returns its index. Throws after seal(), and for an op of the other device.
  int add_node(std::string name, int layer, std::unique_ptr<CpuOp> op, std::vector<BufferId> reads,
               std::vector<BufferId> writes);
  int add_node(std::string name, int layer, std::unique_ptr<GpuOp> op, std::vector<BufferId> reads,
               std::vector<BufferId> writes);
  // Marks that a node attends so: frames build one plan for each (group, num_q_heads). Returns the plan's index.
  int add_attention_plan(const ProgramAttention& wanted);
  // Freezes the program and works out what lives after each node.
  void seal();

  const std::shared_ptr<Gpu>& gpu() const { return gpu_; }
  bool is_batch_invariant() const { return !gpu_ || is_batch_invariant_; }
  bool is_sealed() const { return sealed_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<BufferSpec>& buffers() const { return buffers_; }
  const std::vector<ProgramAttention>& attention_plans() const { return attention_plans_; }
  int num_nodes() const { return static_cast<int>(nodes_.size()); }
  // First node at or after which no recorded node belongs to a layer: where logits and sampling begin.
  int head_node() const { return head_node_; }

 private:
  int add_node(Node node);

  std::shared_ptr<Gpu> gpu_;
  bool is_batch_invariant_;
  std::vector<Node> nodes_;
  std::vector<BufferSpec> buffers_;
  std::vector<ProgramAttention> attention_plans_;
  int head_node_ = 0;
  bool sealed_ = false;
};

}  // namespace partita
