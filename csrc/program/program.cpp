#include "program/program.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/check.h"

namespace partita {

const char* resource_class_name(ResourceClass resource_class) {
  switch (resource_class) {
    case ResourceClass::kCompute:
      return "compute";
    case ResourceClass::kMemory:
      return "memory";
    case ResourceClass::kNetwork:
      return "network";
  }
  return "?";
}

BufferId Program::add_buffer(std::string name, RowKind rows, int64_t width, DType dtype) {
  PARTITA_CHECK(!sealed_, "program: a buffer was added after seal()");
  PARTITA_CHECK(width > 0, "buffer '", name, "': got width ", width, ", wanted a positive number");
  buffers_.push_back({std::move(name), rows, width, dtype});
  return static_cast<BufferId>(buffers_.size()) - 1;
}

int Program::add_node(Node node) {
  PARTITA_CHECK(!sealed_, "program: node '", node.name, "' was added after seal()");
  PARTITA_CHECK((node.gpu_op != nullptr) == (gpu_ != nullptr), "node '", node.name, "': got an op of the ",
                gpu_ ? "CPU, the program is a GPU's" : "GPU, the program is the CPU's");
  for (const auto& list : {node.reads, node.writes})
    for (BufferId buffer : list)
      PARTITA_CHECK(buffer >= 0 && buffer < static_cast<BufferId>(buffers_.size()), "node '", node.name,
                    "': got buffer ", buffer, ", wanted 0 to ", static_cast<int>(buffers_.size()) - 1);
  nodes_.push_back(std::move(node));
  return num_nodes() - 1;
}

int Program::add_node(std::string name, int layer, std::unique_ptr<CpuOp> op, std::vector<BufferId> reads,
                      std::vector<BufferId> writes) {
  const CpuOp* cpu_op = op.get();
  return add_node({std::move(name), layer, std::move(op), cpu_op, nullptr, std::move(reads), std::move(writes), {}});
}

int Program::add_node(std::string name, int layer, std::unique_ptr<GpuOp> op, std::vector<BufferId> reads,
                      std::vector<BufferId> writes) {
  const GpuOp* gpu_op = op.get();
  return add_node({std::move(name), layer, std::move(op), nullptr, gpu_op, std::move(reads), std::move(writes), {}});
}

int Program::add_attention_plan(const ProgramAttention& wanted) {
  for (size_t i = 0; i < attention_plans_.size(); ++i)
    if (attention_plans_[i].group == wanted.group && attention_plans_[i].num_q_heads == wanted.num_q_heads)
      return static_cast<int>(i);
  attention_plans_.push_back(wanted);
  return static_cast<int>(attention_plans_.size()) - 1;
}

void Program::seal() {
  PARTITA_CHECK(!sealed_, "program: sealed twice");
  PARTITA_CHECK(!nodes_.empty(), "program: sealed without nodes");
  // Backwards: a buffer lives after a node when a later node reads it before any node rewrites it.
  std::set<BufferId> live;
  for (int i = num_nodes() - 1; i >= 0; --i) {
    Node& node = nodes_[i];
    node.live_after.assign(live.begin(), live.end());
    for (BufferId buffer : node.writes) live.erase(buffer);
    for (BufferId buffer : node.reads) live.insert(buffer);
  }
  head_node_ = 0;
  for (int i = 0; i < num_nodes(); ++i)
    if (nodes_[i].layer >= 0) head_node_ = i + 1;
  sealed_ = true;
}

}  // namespace partita
