// Append: a token's q, k, v as the linear layer left them -> q ready for attend, K and V in their page slots.
#include <algorithm>

#include "attention/attention.h"
#include "attention/cpu/attend_kernel.h"
#include "core/check.h"
#include "core/cpu_features.h"

namespace partita {
namespace {

constexpr int64_t kTokensPerChunk = 4;

struct StreamRows {
  KvCodec codec;
  std::byte* codes;  // of head 0 in this slot
  size_t codes_head_stride;
  uint16_t* params;
  size_t params_head_stride;  // in uint16_t
};

StreamRows stream_rows(const KvGroupLayout& layout, KvCodec codec, std::byte* stream, int slot) {
  const size_t row_bytes = kv_row_bytes(codec, layout.head_dim);
  return {codec, stream + slot * row_bytes, row_bytes * layout.page_size,
          reinterpret_cast<uint16_t*>(stream + layout.params_offset(codec)) + 2 * slot,
          2 * static_cast<size_t>(layout.page_size)};
}

}  // namespace

const KvRowKernel& active_kv_row_kernel() {
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return kv_row_kernel_avx512();
    case CpuIsa::kAvx2:
      return kv_row_kernel_avx2();
    default:
      return kv_row_kernel_portable();
  }
}

int64_t append_num_chunks(const AttentionParams&, const AttentionBatch& batch) {
  return (batch.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
}

size_t append_scratch_bytes(const AttentionParams&) { return 0; }

void append_run_chunk(const AttentionParams& params, const AttentionBatch& batch, int64_t chunk, std::byte*) {
  const KvGroupLayout& layout = *params.layout;
  const KvRowKernel& kernel = active_kv_row_kernel();
  const int head_dim = layout.head_dim;
  const int num_kv_heads = layout.num_kv_heads;
  const int rotation_size = kv_rotation_size(head_dim);
  const bool rotates_k = kv_codec_rotates(layout.k_codec);
  const bool rotates_v = kv_codec_rotates(layout.v_codec);
  const int64_t token_begin = chunk * kTokensPerChunk;
  const int64_t token_end = std::min(batch.num_tokens, token_begin + kTokensPerChunk);
  const int32_t* cu = batch.cu_seqlens_q;
  int request = static_cast<int>(std::upper_bound(cu, cu + batch.num_requests + 1, token_begin) - cu) - 1;

  for (int64_t token = token_begin; token < token_end; ++token) {
    while (token >= cu[request + 1]) ++request;
    const int64_t position = batch.context_starts[request] + (token - cu[request]);
    const int slot = static_cast<int>(position % layout.page_size);
    std::byte* page = batch.arena + batch.page_tables[request][position / layout.page_size] * batch.arena_page_bytes;
    const StreamRows k = stream_rows(layout, layout.k_codec, page + layout.k_offset(params.layer), slot);
    const StreamRows v = stream_rows(layout, layout.v_codec, page + layout.v_offset(params.layer), slot);
    float* q_row = params.qkv + token * params.qkv_stride;
    float* k_row = q_row + static_cast<int64_t>(params.num_q_heads) * head_dim;
    float* v_row = k_row + static_cast<int64_t>(num_kv_heads) * head_dim;

    const auto prepare = [&](float* x, const float* norm_weight) {
      if (norm_weight) kernel.normalize(x, norm_weight, params.norm_eps, head_dim);
      if (params.rope) {
        const int half = params.rope->rotary_dim / 2;
        kernel.apply_rope(x, params.rope->cos + position * half, params.rope->sin + position * half,
                          params.rope->rotary_dim);
      }
      if (rotates_k) kernel.rotate(x, head_dim, rotation_size);
    };
    for (int head = 0; head < params.num_q_heads; ++head)
      prepare(q_row + static_cast<int64_t>(head) * head_dim, params.q_norm_weight);
    for (int head = 0; head < num_kv_heads; ++head) {
      float* x = k_row + static_cast<int64_t>(head) * head_dim;
      prepare(x, params.k_norm_weight);
      kernel.encode(k.codec, x, head_dim, k.codes + head * k.codes_head_stride, k.params + head * k.params_head_stride);
      x = v_row + static_cast<int64_t>(head) * head_dim;
      if (rotates_v) kernel.rotate(x, head_dim, rotation_size);
      kernel.encode(v.codec, x, head_dim, v.codes + head * v.codes_head_stride, v.params + head * v.params_head_stride);
    }
  }
}

void encode_kv_rows(KvCodec codec, const float* x, int64_t num_rows, int head_dim, std::byte* codes, uint16_t* params) {
  const KvRowKernel& kernel = active_kv_row_kernel();
  const size_t row_bytes = kv_row_bytes(codec, head_dim);
  std::vector<float> row(head_dim);
  for (int64_t r = 0; r < num_rows; ++r) {
    std::copy(x + r * head_dim, x + (r + 1) * head_dim, row.begin());
    if (kv_codec_rotates(codec)) kernel.rotate(row.data(), head_dim, kv_rotation_size(head_dim));
    kernel.encode(codec, row.data(), head_dim, codes + r * row_bytes, params + 2 * r);
  }
}

void decode_kv_rows(KvCodec codec, const std::byte* codes, const uint16_t* params, int64_t num_rows, int head_dim,
                    float* x) {
  const KvRowKernel& kernel = active_kv_row_kernel();
  const size_t row_bytes = kv_row_bytes(codec, head_dim);
  for (int64_t r = 0; r < num_rows; ++r, x += head_dim) {
    kernel.decode(codec, codes + r * row_bytes, params + 2 * r, head_dim, x);
    if (kv_codec_rotates(codec)) kernel.rotate(x, head_dim, kv_rotation_size(head_dim));
  }
}

void decode_page_stream(const KvGroupLayout& layout, const std::byte* page, int layer, int kv_head, bool is_key,
                        float* out) {
  const KvCodec codec = is_key ? layout.k_codec : layout.v_codec;
  const std::byte* stream = page + (is_key ? layout.k_offset(layer) : layout.v_offset(layer));
  const int64_t first_row = int64_t{kv_head} * layout.page_size;
  const auto* params = reinterpret_cast<const uint16_t*>(stream + layout.params_offset(codec)) + 2 * first_row;
  decode_kv_rows(codec, stream + first_row * kv_row_bytes(codec, layout.head_dim), params, layout.page_size,
                 layout.head_dim, out);
}

void check_attention(const AttentionParams& params, const AttentionBatch& batch) {
  PARTITA_CHECK(params.layout != nullptr, "layout: got null");
  const KvGroupLayout& layout = *params.layout;
  layout.check();
  PARTITA_CHECK(params.layer >= 0 && params.layer < layout.num_layers, "layer: got ", params.layer, ", wanted 0 to ",
                layout.num_layers - 1);
  PARTITA_CHECK(params.num_q_heads >= 1 && params.num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ",
                params.num_q_heads, ", wanted a multiple of num_kv_heads = ", layout.num_kv_heads);
  PARTITA_CHECK(params.scale > 0 && params.scale < 1e30f, "scale: got ", params.scale, ", wanted a positive number");
  PARTITA_CHECK(params.soft_cap >= 0 && params.soft_cap < 1e30f, "soft_cap: got ", params.soft_cap,
                ", wanted 0 (none) or a positive number");
  const int64_t qkv_width = int64_t{params.num_q_heads + 2 * layout.num_kv_heads} * layout.head_dim;
  const int64_t out_width = int64_t{params.num_q_heads} * layout.head_dim;
  PARTITA_CHECK(params.qkv_stride >= qkv_width, "qkv: got ", params.qkv_stride, " floats per token, wanted ",
                qkv_width);
  PARTITA_CHECK(params.out_stride >= out_width, "out: got ", params.out_stride, " floats per token, wanted ",
                out_width);
  if (params.rope)
    PARTITA_CHECK(params.rope->rotary_dim % 2 == 0 && params.rope->rotary_dim <= layout.head_dim,
                  "rope: got rotary_dim ", params.rope->rotary_dim,
                  ", wanted an even number up to head_dim = ", layout.head_dim);
  PARTITA_CHECK(batch.arena_page_bytes >= layout.page_bytes() && batch.arena_page_bytes % 64 == 0,
                "arena: got pages of ", batch.arena_page_bytes, " bytes, wanted a multiple of 64, at least ",
                layout.page_bytes());
  PARTITA_CHECK(batch.num_requests >= 0 && batch.cu_seqlens_q[0] == 0 &&
                    batch.cu_seqlens_q[batch.num_requests] == batch.num_tokens,
                "cu_seqlens_q: got ", batch.cu_seqlens_q[0], " to ", batch.cu_seqlens_q[batch.num_requests],
                ", wanted 0 to ", batch.num_tokens);
  for (int r = 0; r < batch.num_requests; ++r) {
    const int64_t num_tokens = int64_t{batch.cu_seqlens_q[r + 1]} - batch.cu_seqlens_q[r];
    PARTITA_CHECK(num_tokens >= 0, "cu_seqlens_q: got a decrease at request ", r);
    PARTITA_CHECK(batch.context_starts[r] >= 0, "context_starts[", r, "]: got ", batch.context_starts[r],
                  ", wanted a position");
    const int64_t end = batch.context_starts[r] + num_tokens;
    if (params.rope)
      PARTITA_CHECK(end <= params.rope->num_positions, "context_starts[", r, "]: got positions up to ", end - 1,
                    ", but the rotary table ends at ", params.rope->num_positions - 1);
    if (num_tokens == 0) continue;
    for (int64_t page = 0; page * layout.page_size < end; ++page)
      PARTITA_CHECK(batch.page_tables[r][page] >= 0, "page_tables[", r, "][", page, "]: got ",
                    batch.page_tables[r][page], ", wanted a page id");
  }
}

}  // namespace partita
