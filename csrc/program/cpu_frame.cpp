#include "program/cpu_frame.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/check.h"

namespace partita {

CpuFrame::CpuFrame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena,
                   std::shared_ptr<RowStore> rows, int64_t max_tokens, int64_t max_logit_rows)
    : Frame(std::move(program), std::move(arena), std::move(rows), max_tokens, max_logit_rows) {
  PARTITA_CHECK(!program_->gpu(), "program: got a GPU's, wanted the CPU's");
  for (const BufferSpec& spec : program_->buffers())
    buffers_.emplace_back(spec.row_bytes() * (spec.rows == RowKind::kToken ? max_tokens_ : max_logit_rows_));
  const size_t num_groups = arena_->groups().size();
  page_tables_.resize(num_groups);
  attention_batches_.resize(num_groups);
  attention_plans_.resize(program_->attention_plans().size());
  attention_workspaces_.resize(attention_plans_.size());
}

void CpuFrame::read_buffer(BufferId id, float* out) const {
  const BufferSpec& spec = program_->buffers()[id];
  PARTITA_CHECK(spec.dtype == DType::kF32, "name: got '", spec.name, "', which holds ", dtype_name(spec.dtype),
                ", wanted a buffer of float32");
  std::copy_n(buffer_as<float>(id), num_rows(spec.rows) * spec.width, out);
}

void CpuFrame::build_step() {
  for (size_t group = 0; group < page_tables_.size(); ++group) {
    page_tables_[group].clear();
    for (const StepRow& step_row : step_rows())
      page_tables_[group].push_back(row_store_->page_table(step_row.row, static_cast<int>(group)));
    AttentionBatch& batch = attention_batches_[group];
    batch.num_tokens = num_tokens();
    batch.num_requests = static_cast<int>(num_requests());
    batch.cu_seqlens_q = cu_seqlens_q();
    batch.context_starts = context_starts();
    batch.page_tables = page_tables_[group].data();
    batch.arena = arena_->data();
    batch.arena_page_bytes = arena_->page_bytes();
  }
  for (size_t i = 0; i < attention_plans_.size(); ++i) {
    const ProgramAttention& wanted = program_->attention_plans()[i];
    AttentionPlan& plan = attention_plans_[i];
    plan.build(arena_->groups()[wanted.group], wanted.num_q_heads, attention_batches_[wanted.group]);
    shape_.score_pairs = std::max(shape_.score_pairs, plan.score_pairs());
    if (attention_workspaces_[i].bytes() < plan.workspace_bytes())
      attention_workspaces_[i] = AlignedBuffer(plan.workspace_bytes());
    // Where this plan counts, the last one may have left partial results. Each attend leaves the counters at zero.
    if (plan.counter_bytes() > 0) std::memset(attention_workspaces_[i].data(), 0, plan.counter_bytes());
  }
}

}  // namespace partita
