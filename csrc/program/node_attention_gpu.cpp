#include "program/node_attention_gpu.h"

#include <utility>

#include "core/check.h"
#include "program/node_linear_gpu.h"

namespace partita {

GpuRopeStorage::GpuRopeStorage(const std::shared_ptr<Gpu>& gpu, const RopeTableStorage& host) {
  const RopeTable rope = host.table();
  const size_t count = static_cast<size_t>(rope.num_positions * (rope.rotary_dim / 2));
  cos_ = upload_floats(gpu, {rope.cos, rope.cos + count}, "rotary table");
  sin_ = upload_floats(gpu, {rope.sin, rope.sin + count}, "rotary table");
  table_ = {cos_.as<float>(), sin_.as<float>(), rope.rotary_dim, rope.num_positions};
}

GpuAttentionOp::GpuAttentionOp(const Program& program, AttentionNode node, std::shared_ptr<const GpuRopeStorage> rope)
    : node_(std::move(node)),
      qkv_(program.buffers()[node_.qkv]),
      output_(program.buffers()[node_.output]),
      rope_(std::move(rope)) {
  check_attention_node(node_, qkv_.width, output_.width);
  q_norm_weight_ = upload_floats(program.gpu(), node_.q_norm_weight, "q norm weight");
  k_norm_weight_ = upload_floats(program.gpu(), node_.k_norm_weight, "k norm weight");
}

std::string GpuAttentionOp::detail() const { return attention_detail(node_); }

NodeCost GpuAttentionOp::cost(const StepShape& shape) const {
  return attention_cost(node_, shape, qkv_.row_bytes() + output_.row_bytes());
}

void GpuAttentionOp::launch(const GpuRun& run) const {
  const GpuStepLayout& layout = *run.layout;
  GpuAttentionBatch batch;
  batch.num_tokens = run.num_tokens;
  batch.num_requests = run.num_requests;
  batch.token_positions = run.input(layout.token_positions);
  batch.token_requests = run.input(layout.token_requests);
  batch.cu_seqlens_q = run.input(layout.cu_seqlens_q);
  batch.context_starts = run.input(layout.context_starts);
  batch.page_tables = run.input(layout.page_tables[node_.group]);
  batch.page_table_stride = run.page_table_stride;
  batch.arena = run.arena->data();
  batch.arena_page_bytes = run.arena->page_bytes();
  GpuAttentionParams p;
  p.layout = &node_.layout;
  p.layer = node_.layer_in_group;
  p.num_q_heads = node_.num_q_heads;
  if (rope_) p.rope = rope_->table();
  p.q_norm_weight = q_norm_weight_.as<float>();
  p.k_norm_weight = k_norm_weight_.as<float>();
  p.norm_eps = node_.norm_eps;
  p.scale = node_.scale;
  p.soft_cap = node_.soft_cap;
  p.exact = node_.exact;
  p.qkv = run.memory->buffer(node_.qkv);
  p.qkv_type = qkv_.dtype;
  p.qkv_stride = qkv_.width;
  p.out = run.memory->buffer(node_.output);
  p.out_type = output_.dtype;
  p.out_stride = output_.width;
  p.num_ctas = run.num_ctas;
  append_gpu(*run.gpu, p, batch, run.stream);
  attend_gpu(*run.gpu, p, batch, (*run.plans)[node_.plan], run.input(layout.plan_tables[node_.plan]),
             run.memory->attention_workspace(), run.stream);
}

}  // namespace partita
