// Attend: work item of a plan -> task of the active instruction set; counts down the items that share a query tile.
#include <atomic>

#include "attention/attention_plan.h"
#include "attention/cpu/attend_kernel.h"
#include "core/cpu_features.h"

namespace partita {
namespace {

KvStream kv_stream(const KvGroupLayout& layout, KvCodec codec, size_t stream_offset, int kv_head) {
  const size_t row_bytes = kv_row_bytes(codec, layout.head_dim);
  const size_t first_row = static_cast<size_t>(kv_head) * layout.page_size;
  return {codec, stream_offset + first_row * row_bytes,
          stream_offset + layout.params_offset(codec) + first_row * 2 * sizeof(uint16_t), row_bytes};
}

AttendTask make_task(const AttentionParams& params, const AttentionBatch& batch, const AttentionPlan::Item& item) {
  const KvGroupLayout& layout = *params.layout;
  const int group = params.num_q_heads / layout.num_kv_heads;
  const int64_t first_head = int64_t{item.kv_head} * group;
  AttendTask task;
  task.num_rows = (item.token_end - item.token_begin) * group;
  task.group = group;
  task.head_dim = layout.head_dim;
  task.first_position =
      int64_t{batch.context_starts[item.request]} + item.token_begin - batch.cu_seqlens_q[item.request];
  task.q = params.qkv + item.token_begin * params.qkv_stride + first_head * layout.head_dim;
  task.q_stride = params.qkv_stride;
  task.out = params.out + item.token_begin * params.out_stride + first_head * layout.head_dim;
  task.out_stride = params.out_stride;
  task.page_table = batch.page_tables[item.request];
  task.arena = batch.arena;
  task.arena_page_bytes = batch.arena_page_bytes;
  task.page_size = layout.page_size;
  task.k = kv_stream(layout, layout.k_codec, layout.k_offset(params.layer), item.kv_head);
  task.v = kv_stream(layout, layout.v_codec, layout.v_offset(params.layer), item.kv_head);
  task.window = layout.window;
  task.scale = params.scale;
  task.soft_cap = params.soft_cap;
  task.exact = params.exact;
  task.split_begin = item.split_begin;
  task.split_end = item.split_end;
  task.partials = nullptr;
  return task;
}

}  // namespace

const AttendKernel& active_attend_kernel() {
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return attend_kernel_avx512();
    case CpuIsa::kAvx2:
      return attend_kernel_avx2();
    default:
      return attend_kernel_portable();
  }
}

void attend_run_chunk(const AttentionParams& params, const AttentionBatch& batch, const AttentionPlan& plan,
                      int64_t chunk, int64_t next_chunk, std::byte* workspace, std::byte* scratch) {
  const AttentionPlan::Item& item = plan.item(chunk);
  const AttendKernel& kernel = active_attend_kernel();
  AttendTask task = make_task(params, batch, item);
  AttendTask next;
  const bool has_next = next_chunk >= 0 && next_chunk < plan.num_chunks();
  if (has_next) next = make_task(params, batch, plan.item(next_chunk));
  if (item.counter_idx < 0) {
    kernel.attend(task, has_next ? &next : nullptr, scratch);
    return;
  }

  auto* partials = reinterpret_cast<float*>(workspace + item.partials_offset);
  const size_t floats = partial_floats(task.num_rows, task.head_dim);
  task.partials = partials + floats * (item.split_begin - item.first_split);
  kernel.attend(task, has_next ? &next : nullptr, scratch);
  auto* counter = reinterpret_cast<std::atomic<int32_t>*>(workspace + size_t{64} * item.counter_idx);
  if (counter->fetch_add(1, std::memory_order_acq_rel) + 1 < item.num_items) return;
  counter->store(0, std::memory_order_relaxed);
  kernel.merge(task, partials, item.num_splits, scratch);
}

}  // namespace partita
