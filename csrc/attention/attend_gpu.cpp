// Attend on a GPU: check -> select -> launch.
#include <algorithm>

#include "attention/attend_gpu_kernels.h"
#include "core/check.h"
#include "core/gpu_library.h"

namespace partita {
namespace {

bool is_row_type(DType type) { return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16; }

std::string codec_pair(const KvGroupLayout& layout) {
  return concat(kv_codec_name(layout.k_codec), ":", kv_codec_name(layout.v_codec));
}

// Why no tuned kernel can take this at all; empty where one may.
std::string untuned_reason(const GpuAttentionDesc& desc) {
  const KvGroupLayout& layout = desc.layout;
  const int group = desc.num_q_heads / layout.num_kv_heads;
  if (desc.exact) return "exact mode computes in fp32";
  if (layout.k_codec == KvCodec::kF32 || layout.v_codec == KvCodec::kF32) return "fp32 pages need fp32 arithmetic";
  if (group > kMaxAttendGroup)
    return concat(group, " query heads share a KV head, more than the ", kMaxAttendGroup, " of a tile");
  for (KvCodec codec : {layout.k_codec, layout.v_codec}) {
    // The kernels copy rows of int4 in halves of a vector where they are no whole ones.
    const int unit = stored_codec(codec) == KvCodec::kInt4Plain ? 8 : 16;
    if (kv_row_bytes(codec, layout.head_dim) % unit != 0)
      return concat("rows of ", kv_codec_name(codec), " at head_dim ", layout.head_dim, " are ",
                    kv_row_bytes(codec, layout.head_dim), " bytes, no multiple of ", unit);
  }
  return "";
}

// What never ran on hardware gives way to what did; then the one that pads least.
template <typename Kernel>
bool is_better(const Kernel& a, const Kernel* b) {
  if (!b) return true;
  const bool a_ran = a.info.verified_on[0] != 0, b_ran = b->info.verified_on[0] != 0;
  if (a_ran != b_ran) return a_ran;
  return a.max_head_dim < b->max_head_dim;
}

int log2_of(int value) {
  int log = 0;
  while (1 << log < value) ++log;
  return log;
}

GpuKvStream kv_stream(const KvGroupLayout& layout, KvCodec codec, size_t offset) {
  return {stored_codec(codec), static_cast<int32_t>(kv_row_bytes(codec, layout.head_dim)), static_cast<int64_t>(offset),
          static_cast<int64_t>(offset + layout.params_offset(codec))};
}

AttendKernelParams kernel_params(const GpuAttentionParams& params, const GpuAttentionBatch& batch) {
  const KvGroupLayout& layout = *params.layout;
  AttendKernelParams kernel{};
  kernel.arena = batch.arena;
  kernel.arena_page_bytes = static_cast<int64_t>(batch.arena_page_bytes);
  kernel.k = kv_stream(layout, layout.k_codec, layout.k_offset(params.layer));
  kernel.v = kv_stream(layout, layout.v_codec, layout.v_offset(params.layer));
  kernel.page_size = layout.page_size;
  kernel.page_size_log2 = log2_of(layout.page_size);
  kernel.head_dim = layout.head_dim;
  kernel.num_kv_heads = layout.num_kv_heads;
  kernel.group = params.num_q_heads / layout.num_kv_heads;
  kernel.window = layout.window;
  kernel.v_rotation = kv_codec_rotates(layout.v_codec) ? kv_rotation_size(layout.head_dim) : 0;
  kernel.page_tables = batch.page_tables;
  kernel.page_table_stride = batch.page_table_stride;
  kernel.num_tokens = batch.num_tokens;
  kernel.token_positions = batch.token_positions;
  kernel.token_requests = batch.token_requests;
  kernel.q = params.qkv;
  kernel.q_stride = params.qkv_stride;
  kernel.out = params.out;
  kernel.out_stride = params.out_stride;
  kernel.q_type = params.qkv_type;
  kernel.out_type = params.out_type;
  kernel.scale = params.scale;
  kernel.soft_cap = params.soft_cap;
  constexpr float kLog2E = 1.4426950408889634f;
  kernel.score_scale = params.soft_cap > 0 ? params.scale / params.soft_cap : params.scale * kLog2E;
  kernel.score_cap = params.soft_cap * kLog2E;
  return kernel;
}

}  // namespace

void check_attention_gpu(const GpuAttentionParams& params, const GpuAttentionBatch& batch) {
  PARTITA_CHECK(params.layout != nullptr, "layout: got none");
  const KvGroupLayout& layout = *params.layout;
  layout.check();
  PARTITA_CHECK(params.layer >= 0 && params.layer < layout.num_layers, "layer: got ", params.layer, ", wanted 0 to ",
                layout.num_layers - 1);
  PARTITA_CHECK(params.num_q_heads >= 1 && params.num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ",
                params.num_q_heads, ", wanted a multiple of num_kv_heads = ", layout.num_kv_heads);
  PARTITA_CHECK(is_row_type(params.qkv_type), "qkv: got dtype ", dtype_name(params.qkv_type),
                ", wanted float32, float16 or bfloat16");
  PARTITA_CHECK(is_row_type(params.out_type), "out: got dtype ", dtype_name(params.out_type),
                ", wanted float32, float16 or bfloat16");
  PARTITA_CHECK(!params.exact || params.qkv_type == DType::kF32, "qkv: got dtype ", dtype_name(params.qkv_type),
                " in exact mode, wanted float32");
  const int64_t q_width = int64_t{params.num_q_heads} * layout.head_dim;
  const int64_t qkv_width = q_width + int64_t{2} * layout.num_kv_heads * layout.head_dim;
  PARTITA_CHECK(params.qkv_stride >= qkv_width && params.qkv_stride % 2 == 0, "qkv_stride: got ", params.qkv_stride,
                ", wanted an even number of at least ", qkv_width);
  PARTITA_CHECK(params.out_stride >= q_width && params.out_stride % 2 == 0, "out_stride: got ", params.out_stride,
                ", wanted an even number of at least ", q_width);
  PARTITA_CHECK(params.soft_cap >= 0, "soft_cap: got ", params.soft_cap, ", wanted 0 (none) or a positive number");
  PARTITA_CHECK(params.num_ctas >= 0, "num_ctas: got ", params.num_ctas, ", wanted 0 or a positive number");
  PARTITA_CHECK(batch.num_tokens >= 0 && batch.num_tokens <= INT32_MAX, "num_tokens: got ", batch.num_tokens,
                ", wanted a number below 2^31");
  PARTITA_CHECK(batch.num_requests >= 0, "num_requests: got ", batch.num_requests, ", wanted no negative number");
  if (batch.num_tokens == 0) return;
  PARTITA_CHECK(params.qkv && params.out, "qkv, out: got a null pointer");
  PARTITA_CHECK(batch.token_positions && batch.token_requests && batch.page_tables && batch.arena,
                "batch: got a null pointer");
  PARTITA_CHECK(batch.page_table_stride >= 1, "page_table_stride: got ", batch.page_table_stride,
                ", wanted at least 1");
  PARTITA_CHECK(batch.arena_page_bytes >= layout.page_bytes() && batch.arena_page_bytes % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(batch.arena) % 16 == 0,
                "arena: got pages of ", batch.arena_page_bytes, " bytes at ", static_cast<const void*>(batch.arena),
                ", wanted multiples of 16 and at least ", layout.page_bytes(), " bytes");
}

AttendSelection select_attend(const Gpu& gpu, const GpuAttentionDesc& desc) {
  const KvGroupLayout& layout = desc.layout;
  layout.check();
  PARTITA_CHECK(desc.num_q_heads >= 1 && desc.num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ",
                desc.num_q_heads, ", wanted a multiple of num_kv_heads = ", layout.num_kv_heads);
  const KernelRegistry& registry = kernels_of(gpu);
  const size_t shared_limit = gpu.properties().shared_bytes_per_block;
  const int group = desc.num_q_heads / layout.num_kv_heads;
  AttendSelection selection;
  selection.naive = registry.only<AttendNaiveKernel>();
  selection.merge = registry.only<AttendMergeKernel>();
  std::string& reasons = selection.reasons;
  reasons = concat("attend ", codec_pair(layout), ", head_dim ", layout.head_dim, ", ", group,
                   " query heads to a KV head, ", dtype_name(desc.qkv_type), " queries\n");
  const std::string untuned = untuned_reason(desc);
  const KvCodec k = stored_codec(layout.k_codec), v = stored_codec(layout.v_codec);
  if (untuned.empty()) {
    for (const auto* kernel : registry.all<AttendDecodeKernel>()) {
      if (kernel->k_codec != k || kernel->v_codec != v || kernel->max_head_dim < layout.head_dim) continue;
      const int columns = kernel->shared_bytes(16) <= shared_limit ? 16 : 8;
      if (group > columns || kernel->shared_bytes(columns) > shared_limit) {
        reasons += concat("  ", kernel->info.name, ": wants ", kernel->shared_bytes(group > 8 ? 16 : 8),
                          " bytes of shared memory, a block has ", shared_limit, "\n");
      } else if (is_better(*kernel, selection.decode)) {
        selection.decode = kernel;
        selection.decode_columns = columns;
      }
    }
    for (const auto* kernel : registry.all<AttendPrefillKernel>()) {
      if (kernel->max_head_dim < layout.head_dim) continue;
      const bool reads_directly = !kernel->converts && kernel->codec == k && kernel->codec == v;
      if (!reads_directly && !kernel->converts) continue;
      if (kernel->shared_bytes > shared_limit) {
        reasons += concat("  ", kernel->info.name, ": wants ", kernel->shared_bytes,
                          " bytes of shared memory, a block has ", shared_limit, "\n");
        continue;
      }
      const AttendPrefillKernel* best = selection.prefill;
      // Pages that need no conversion are not converted.
      if (best && best->converts != kernel->converts ? best->converts : is_better(*kernel, best))
        selection.prefill = kernel;
    }
  }
  if (selection.prefill && !selection.merge) {
    reasons += "  tuned kernels: this library was built without attend_merge\n";
    selection.prefill = nullptr;
  }
  if (selection.prefill && selection.naive && selection.naive->info.verified_on[0] != 0 &&
      selection.prefill->info.verified_on[0] == 0) {
    reasons += concat("  ", selection.prefill->info.name, ": never ran on hardware, and attend_naive did\n");
    selection.prefill = nullptr;
  }
  const auto ran = [](const KernelInfo& info) {
    return info.verified_on[0] ? concat("verified on ", info.verified_on) : std::string("never ran on hardware");
  };
  if (!selection.prefill) {
    selection.decode = nullptr;
    reasons += concat("  tuned kernels: ",
                      untuned.empty()
                          ? concat("none in this library for ", codec_pair(layout), " at head_dim ", layout.head_dim)
                          : untuned,
                      "\n");
    if (!selection.naive) throw std::runtime_error(concat("attend: this library has no kernel for it\n", reasons));
    reasons += concat("  attend_naive: taken (", ran(selection.naive->info), ")\n");
    return selection;
  }
  reasons += concat("  ", selection.prefill->info.name, ": taken for many rows (", ran(selection.prefill->info), ")\n");
  if (selection.decode)
    reasons += concat("  ", selection.decode->info.name, ": taken for few rows (", ran(selection.decode->info), ")\n");
  else
    reasons += concat("  decode: no kernel for ", codec_pair(layout), ", few rows take the tile of many\n");
  return selection;
}

void attend_gpu(Gpu& gpu, const GpuAttentionParams& params, const GpuAttentionBatch& batch,
                const GpuAttentionPlan& plan, const int32_t* device_tables, std::byte* workspace, GpuStream stream) {
  check_attention_gpu(params, batch);
  if (batch.num_tokens == 0) return;
  const GpuAttentionDesc& desc = plan.desc();
  PARTITA_CHECK(&plan.gpu() == &gpu, "plan: was made for another device");
  PARTITA_CHECK(desc.num_q_heads == params.num_q_heads && desc.exact == params.exact &&
                    desc.qkv_type == params.qkv_type && desc.layout.page_bytes() == params.layout->page_bytes() &&
                    desc.layout.head_dim == params.layout->head_dim && desc.layout.window == params.layout->window &&
                    desc.layout.k_codec == params.layout->k_codec && desc.layout.v_codec == params.layout->v_codec,
                "plan: was made for another layout, type or number of heads than params has");
  AttendKernelParams kernel = kernel_params(params, batch);
  const AttendSelection& selection = plan.selection();
  if (!selection.prefill) {
    const int64_t num_rows = batch.num_tokens * params.num_q_heads;
    constexpr int64_t kMostCtas = 65535;
    const int64_t wanted = params.num_ctas > 0 ? params.num_ctas : kMostCtas;
    selection.naive->launch(kernel, static_cast<int>(std::min((num_rows + 3) / 4, wanted)), stream);
    return;
  }
  PARTITA_CHECK(device_tables != nullptr && reinterpret_cast<uintptr_t>(device_tables) % 16 == 0, "device_tables: got ",
                static_cast<const void*>(device_tables), ", wanted the plan's tables at a multiple of 16");
  PARTITA_CHECK(
      plan.workspace_bytes() == 0 || (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0),
      "workspace: got ", static_cast<const void*>(workspace), ", wanted ", plan.workspace_bytes(),
      " bytes at a multiple of 16");
  const int64_t sums_bytes = (plan.num_partial_rows() * 8 + 255) / 256 * 256;
  kernel.partial_sums = reinterpret_cast<float*>(workspace);
  kernel.partial_out = plan.num_partial_rows() ? reinterpret_cast<float*>(workspace + sums_bytes) : nullptr;
  const auto run = [&](const GpuAttentionPlan::Launch& launch, auto start) {
    if (launch.num_ctas == 0) return;
    kernel.queues = device_tables + launch.queues;
    kernel.items = reinterpret_cast<const GpuAttendItem*>(device_tables + launch.items);
    start(launch);
  };
  run(plan.decode(), [&](const GpuAttentionPlan::Launch& launch) {
    selection.decode->launch(kernel, launch.num_columns, launch.num_ctas, stream);
  });
  run(plan.prefill(),
      [&](const GpuAttentionPlan::Launch& launch) { selection.prefill->launch(kernel, launch.num_ctas, stream); });
  const GpuAttentionPlan::MergeLaunch& merge = plan.merge();
  if (merge.num_ctas == 0) return;
  kernel.num_merges = device_tables + merge.count;
  kernel.merges = reinterpret_cast<const GpuAttendMerge*>(device_tables + merge.merges);
  kernel.parts = device_tables + merge.parts;
  selection.merge->launch(kernel, merge.num_ctas, stream);
}

}  // namespace partita
