// A frame on the CPU: activations and attention plans in host memory.
#pragma once

#include <vector>

#include "attention/attention_plan.h"
#include "core/aligned_buffer.h"
#include "program/frame.h"

namespace partita {

class CpuFrame final : public Frame {
 public:
  // Buffers are sized for max_tokens rows and max_logit_rows logit rows; memory is touched when used.
  CpuFrame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena, std::shared_ptr<RowStore> rows,
           int64_t max_tokens, int64_t max_logit_rows);

  void read_buffer(BufferId id, float* out) const override;

  std::byte* buffer(BufferId id) const { return buffers_[id].data(); }
  template <typename T>
  T* buffer_as(BufferId id) const {
    return buffers_[id].as<T>();
  }
  const AttentionBatch& attention_batch(int group) const { return attention_batches_[group]; }
  const AttentionPlan& attention_plan(int plan) const { return attention_plans_[plan]; }
  std::byte* attention_workspace(int plan) const { return attention_workspaces_[plan].data(); }

 private:
  void build_step() override;

  std::vector<std::vector<const int32_t*>> page_tables_;  // [groups][R]
  std::vector<AttentionBatch> attention_batches_;         // [groups]
  std::vector<AttentionPlan> attention_plans_;            // as in Program::attention_plans
  std::vector<AlignedBuffer> attention_workspaces_;
  std::vector<AlignedBuffer> buffers_;  // as in Program::buffers
};

}  // namespace partita
