#include "program/node_attention.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "program/cpu_frame.h"

namespace partita {

void check_attention_node(const AttentionNode& node, int64_t qkv_width, int64_t output_width) {
  const KvGroupLayout& layout = node.layout;
  layout.check();
  PARTITA_CHECK(node.layer_in_group >= 0 && node.layer_in_group < layout.num_layers, "layer_in_group: got ",
                node.layer_in_group, ", wanted 0 to ", layout.num_layers - 1);
  PARTITA_CHECK(node.num_q_heads > 0 && node.num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ",
                node.num_q_heads, ", wanted a multiple of num_kv_heads ", layout.num_kv_heads);
  for (const auto* weight : {&node.q_norm_weight, &node.k_norm_weight})
    PARTITA_CHECK(weight->empty() || static_cast<int>(weight->size()) == layout.head_dim, "q/k norm weight: got ",
                  weight->size(), " elements, wanted head_dim ", layout.head_dim);
  const int64_t wanted = static_cast<int64_t>(node.num_q_heads + 2 * layout.num_kv_heads) * layout.head_dim;
  PARTITA_CHECK(qkv_width >= wanted, "attention: qkv rows hold ", qkv_width, " elements, wanted ", wanted);
  PARTITA_CHECK(output_width >= static_cast<int64_t>(node.num_q_heads) * layout.head_dim,
                "attention: output rows hold ", output_width, " elements, wanted ", node.num_q_heads * layout.head_dim);
}

std::string attention_detail(const AttentionNode& node) {
  const KvGroupLayout& layout = node.layout;
  std::string text = concat(node.num_q_heads, " query heads over ", layout.num_kv_heads, " of ", layout.head_dim,
                            ", KV ", kv_codec_name(layout.k_codec), ":", kv_codec_name(layout.v_codec));
  if (layout.window > 0) text += concat(", window ", layout.window);
  return text;
}

ResourceClass attention_class(const StepShape& shape) {
  return shape.num_tokens > 2 * shape.num_requests ? ResourceClass::kCompute : ResourceClass::kMemory;
}

NodeCost attention_cost(const AttentionNode& node, const StepShape& shape, int64_t row_bytes) {
  const KvGroupLayout& layout = node.layout;
  NodeCost node_cost;
  node_cost.operations = 4.0 * shape.score_pairs * node.num_q_heads * layout.head_dim;
  // Every request's visible KV once, on average score_pairs / T tokens of it, plus the rows in and out.
  const double tokens_per_row = shape.num_tokens ? shape.score_pairs / shape.num_tokens : 0;
  const double kv_token_bytes = static_cast<double>(layout.layer_bytes()) / layout.page_size;
  node_cost.bytes =
      shape.num_requests * tokens_per_row * kv_token_bytes + static_cast<double>(shape.num_tokens * row_bytes);
  return node_cost;
}

AttentionOp::AttentionOp(AttentionNode node, int64_t qkv_stride, int64_t output_stride)
    : node_(std::move(node)), qkv_stride_(qkv_stride), output_stride_(output_stride) {
  check_attention_node(node_, qkv_stride_, output_stride_);
  if (node_.rope) rope_view_ = node_.rope->table();
}

std::string AttentionOp::detail() const { return attention_detail(node_); }

NodeCost AttentionOp::cost(const StepShape& shape) const {
  return attention_cost(node_, shape, sizeof(float) * (qkv_stride_ + output_stride_));
}

AttentionParams AttentionOp::params(const CpuFrame& frame) const {
  AttentionParams p;
  p.layout = &node_.layout;
  p.layer = node_.layer_in_group;
  p.num_q_heads = node_.num_q_heads;
  p.rope = node_.rope ? &rope_view_ : nullptr;
  p.q_norm_weight = node_.q_norm_weight.empty() ? nullptr : node_.q_norm_weight.data();
  p.k_norm_weight = node_.k_norm_weight.empty() ? nullptr : node_.k_norm_weight.data();
  p.norm_eps = node_.norm_eps;
  p.scale = node_.scale;
  p.soft_cap = node_.soft_cap;
  p.exact = node_.exact;
  p.qkv = frame.buffer_as<float>(node_.qkv);
  p.qkv_stride = qkv_stride_;
  p.out = frame.buffer_as<float>(node_.output);
  p.out_stride = output_stride_;
  return p;
}

int64_t AttentionOp::num_chunks(const CpuFrame& frame, int phase) const {
  if (phase == 0) return append_num_chunks(params(frame), frame.attention_batch(node_.group));
  return frame.attention_plan(node_.plan).num_chunks();
}

void AttentionOp::run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void*) const {
  const AttentionParams p = params(frame);
  const AttentionBatch& batch = frame.attention_batch(node_.group);
  if (phase == 0) {
    append_run_chunk(p, batch, chunk, worker.scratch_of(append_scratch_bytes(p)));
    return;
  }
  const AttentionPlan& plan = frame.attention_plan(node_.plan);
  // Workers that keep pace claim every num_workers-th chunk.
  attend_run_chunk(p, batch, plan, chunk, chunk + worker.num_workers, frame.attention_workspace(node_.plan),
                   worker.scratch_of(plan.worker_scratch_bytes()));
}

}  // namespace partita
