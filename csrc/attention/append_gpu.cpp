// Append on a GPU: checks, places in the page, one launch.
#include <cmath>
#include <stdexcept>

#include "attention/append_gpu_kernel.h"
#include "core/check.h"
#include "core/gpu_library.h"

namespace partita {
namespace {

void check(const GpuAttentionParams& params, const GpuAttentionBatch& batch) {
  PARTITA_CHECK(params.layout != nullptr, "layout: got null");
  const KvGroupLayout& layout = *params.layout;
  layout.check();
  PARTITA_CHECK(params.layer >= 0 && params.layer < layout.num_layers, "layer: got ", params.layer, ", wanted 0 to ",
                layout.num_layers - 1);
  PARTITA_CHECK(params.num_q_heads >= 1 && params.num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ",
                params.num_q_heads, ", wanted a multiple of num_kv_heads = ", layout.num_kv_heads);
  PARTITA_CHECK(params.qkv_type == DType::kF32 || params.qkv_type == DType::kF16 || params.qkv_type == DType::kBF16,
                "qkv: got dtype ", dtype_name(params.qkv_type), ", wanted float32, float16 or bfloat16");
  PARTITA_CHECK(!params.exact || params.qkv_type == DType::kF32, "qkv: got dtype ", dtype_name(params.qkv_type),
                ", wanted float32 in exact mode");
  PARTITA_CHECK(std::isfinite(params.norm_eps) && params.norm_eps >= 0, "norm_eps: got ", params.norm_eps,
                ", wanted a finite number of at least 0");
  PARTITA_CHECK(params.num_ctas >= 0, "num_ctas: got ", params.num_ctas, ", wanted at least 0");
  const int64_t width = int64_t{params.num_q_heads + 2 * layout.num_kv_heads} * layout.head_dim;
  PARTITA_CHECK(params.qkv_stride >= width || batch.num_tokens <= 1, "qkv: got a stride of ", params.qkv_stride,
                ", wanted at least (num_q_heads + 2 * num_kv_heads) * head_dim = ", width);
  if (params.rope.cos) {
    PARTITA_CHECK(params.rope.sin != nullptr, "rope: got cosines without sines");
    PARTITA_CHECK(
        params.rope.rotary_dim > 0 && params.rope.rotary_dim % 2 == 0 && params.rope.rotary_dim <= layout.head_dim,
        "rope: got rotary_dim ", params.rope.rotary_dim, ", wanted an even number up to head_dim = ", layout.head_dim);
  }
  PARTITA_CHECK(batch.num_tokens >= 0, "num_tokens: got ", batch.num_tokens, ", wanted at least 0");
  if (batch.num_tokens == 0) return;
  PARTITA_CHECK(params.qkv, "qkv: got a null pointer");
  PARTITA_CHECK(batch.token_positions && batch.token_requests && batch.page_tables && batch.arena,
                "token_positions, token_requests, page_tables, arena: got a null pointer");
  PARTITA_CHECK(batch.page_table_stride >= 0, "page_table_stride: got ", batch.page_table_stride,
                ", wanted at least 0");
  PARTITA_CHECK(batch.arena_page_bytes >= layout.page_bytes() && batch.arena_page_bytes % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(batch.arena) % 16 == 0,
                "arena: got pages of ", batch.arena_page_bytes,
                " bytes, wanted an address and a size that are multiples of 16, at least ", layout.page_bytes());
}

AppendStream stream_of(const KvGroupLayout& layout, KvCodec codec, size_t offset) {
  return {codec, kv_codec_rotates(codec), static_cast<int64_t>(kv_row_bytes(codec, layout.head_dim)),
          static_cast<int64_t>(offset), static_cast<int64_t>(offset + layout.params_offset(codec))};
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

void append_gpu(Gpu& gpu, const GpuAttentionParams& params, const GpuAttentionBatch& batch, GpuStream stream) {
  check(params, batch);
  if (batch.num_tokens == 0) return;
  const auto* kernel = kernels_of(gpu).only<AppendKernel>();
  if (!kernel) throw std::runtime_error("append: this device library was built without the kernel");
  const KvGroupLayout& layout = *params.layout;
  AppendKernelParams p{};
  p.num_tokens = batch.num_tokens;
  p.token_positions = batch.token_positions;
  p.token_requests = batch.token_requests;
  p.page_tables = batch.page_tables;
  p.page_table_stride = batch.page_table_stride;
  p.arena = batch.arena;
  p.arena_page_bytes = static_cast<int64_t>(batch.arena_page_bytes);
  p.qkv = params.qkv;
  p.qkv_type = params.qkv_type;
  p.qkv_stride = params.qkv_stride;
  p.num_q_heads = params.num_q_heads;
  p.num_kv_heads = layout.num_kv_heads;
  p.head_dim = layout.head_dim;
  p.page_size = layout.page_size;
  p.k = stream_of(layout, layout.k_codec, layout.k_offset(params.layer));
  p.v = stream_of(layout, layout.v_codec, layout.v_offset(params.layer));
  p.q_norm_weight = params.q_norm_weight;
  p.k_norm_weight = params.k_norm_weight;
  p.norm_eps = params.norm_eps;
  p.cos = params.rope.cos;
  p.sin = params.rope.sin;
  p.rotary_dim = params.rope.cos ? params.rope.rotary_dim : 0;
  p.num_positions = params.rope.num_positions;
  p.rotation_size = kv_rotation_size(layout.head_dim);
  p.rotation_factor = 1.0f / std::sqrt(static_cast<float>(p.rotation_size));
  p.changes_q = p.q_norm_weight || p.cos || p.k.rotates;
  // Heads are multiples of 8 elements wide, so a row that is aligned has only aligned heads.
  p.is_vector = is_aligned(p.qkv) && p.qkv_stride * static_cast<int64_t>(dtype_bytes(p.qkv_type)) % 16 == 0;
  p.is_rope_vector = p.rotary_dim % 16 == 0 && is_aligned(p.cos) && is_aligned(p.sin) && is_aligned(p.q_norm_weight) &&
                     is_aligned(p.k_norm_weight);
  kernel->launch(p, params.num_ctas, stream);
}

}  // namespace partita
