#include "program/gpu_frame_memory.h"

#include <algorithm>
#include <map>

#include "core/check.h"

namespace partita {
namespace {

constexpr size_t kAlignment = 256;
size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

GpuResultLayout::GpuResultLayout(int64_t num_logit_rows) {
  int64_t end = 0;
  const auto section = [&end](int64_t entries) {
    const int64_t begin = end;
    end += (entries * 4 + 15) / 16 * 16;
    return begin;
  };
  tokens = section(num_logit_rows);
  ranks = section(num_logit_rows);
  logprobs = section(num_logit_rows);
  bytes_without_top = end;
  top_ids = section(num_logit_rows * kMaxTopLogprobs);
  top_logprobs = section(num_logit_rows * kMaxTopLogprobs);
  num_bytes = end;
}

GpuFrameMemory::Places::Places(const Program& program, const GpuStepLimits& limits) {
  for (const BufferSpec& spec : program.buffers()) {
    const int64_t rows = spec.rows == RowKind::kToken ? limits.max_tokens : limits.max_logit_rows;
    buffers.push_back(num_bytes);
    num_bytes += aligned(spec.row_bytes() * rows);
  }
  std::map<std::string, size_t> bytes_of;
  for (const Node& node : program.nodes()) {
    const size_t wanted = node.gpu_op->workspace_bytes(limits);
    if (wanted == 0) continue;
    size_t& bytes = bytes_of[node.gpu_op->workspace_key()];
    bytes = std::max(bytes, wanted);
  }
  for (const auto& [key, bytes] : bytes_of) {
    workspaces.push_back({key, num_bytes});
    num_bytes += aligned(bytes);
  }

  GpuStepSizes sizes;
  sizes.num_tokens = limits.max_tokens;
  sizes.num_requests = limits.max_requests;
  sizes.num_logit_rows = limits.max_logit_rows;
  sizes.num_copies = limits.max_copies();
  sizes.page_table_stride = limits.max_pages();
  sizes.num_groups = limits.num_groups;
  size_t attention_bytes = 0;
  // A graph's tables follow from its bucket; a bucket may want more than the next larger one.
  std::vector<GpuPlanOptions> wanted(1);
  // Plans of plain steps may read shared prefixes apart, which makes more parts.
  if (!limits.is_batch_invariant) wanted[0].shared_prefixes.push_back({0, 2, limits.page_size});
  if (limits.graph_rows > 0) {
    wanted.clear();
    for (int rows : decode_buckets(limits.graph_rows)) {
      wanted.emplace_back();
      wanted.back().graph_rows = rows;
    }
  }
  for (const GpuAttentionPlan& plan : make_attention_plans(program)) {
    size_t entries = 0;
    for (GpuPlanOptions& options : wanted) {
      options.is_batch_invariant = limits.is_batch_invariant;
      options.max_context = limits.max_context;
      const int64_t tokens = options.graph_rows > 0 ? options.graph_rows : limits.max_tokens;
      const int64_t requests = options.graph_rows > 0 ? options.graph_rows : limits.max_requests;
      entries = std::max(entries, plan.max_table_entries(tokens, requests, limits.max_context, options));
      attention_bytes =
          std::max(attention_bytes, plan.max_workspace_bytes(tokens, requests, limits.max_context, options));
    }
    sizes.plan_entries.push_back(static_cast<int64_t>(entries));
  }
  attention_workspace = num_bytes;
  num_bytes += aligned(attention_bytes);
  input_bytes = static_cast<size_t>(GpuStepLayout(sizes).num_bytes);
}

GpuFrameMemory::GpuFrameMemory(const Program& program, const GpuStepLimits& limits)
    : limits_(limits), result_layout_(limits.max_logit_rows), places_(program, limits) {
  const std::shared_ptr<Gpu>& gpu = program.gpu();
  inputs_ = GpuBuffer(gpu, places_.input_bytes, "step inputs");
  results_ = GpuBuffer(gpu, static_cast<size_t>(result_layout_.num_bytes), "step results");
  memory_ = GpuBuffer(gpu, std::max<size_t>(places_.num_bytes, 1), "activations");
  // Counters must begin at zero; activations need not.
  if (!places_.workspaces.empty()) {
    const size_t first = places_.workspaces.front().second;
    gpu->fill(memory_.data() + first, 0, places_.attention_workspace - first, gpu->default_stream());
    gpu->synchronize(gpu->default_stream());
  }
}

size_t GpuFrameMemory::bytes(const Program& program, const GpuStepLimits& limits) {
  const Places places(program, limits);
  return aligned(places.input_bytes) + aligned(places.num_bytes) +
         aligned(static_cast<size_t>(GpuResultLayout(limits.max_logit_rows).num_bytes));
}

std::byte* GpuFrameMemory::workspace(const std::string& key) const {
  for (const auto& [name, offset] : places_.workspaces)
    if (name == key) return memory_.data() + offset;
  return nullptr;
}

std::vector<GpuAttentionPlan> make_attention_plans(const Program& program) {
  std::vector<GpuAttentionPlan> plans;
  for (const ProgramAttention& wanted : program.attention_plans())
    plans.emplace_back(program.gpu(),
                       GpuAttentionDesc{wanted.layout, wanted.num_q_heads, wanted.qkv_type, wanted.exact});
  return plans;
}

std::vector<int> decode_buckets(int most) {
  std::vector<int> buckets;
  // A step costs about what its weights cost to read: a few rows too many are cheap, a graph for every count is not.
  for (int bucket = 1; bucket < most;) {
    buckets.push_back(bucket);
    bucket += bucket < 8 ? bucket : bucket < 32 ? 8 : bucket < 64 ? 16 : bucket < 256 ? 32 : 64;
  }
  buckets.push_back(most);
  return buckets;
}

}  // namespace partita
