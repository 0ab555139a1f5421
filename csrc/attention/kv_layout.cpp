// Sizes and places inside a page: the one definition of the byte image that attention.h documents.
#include "attention/attention.h"
#include "core/check.h"

namespace partita {
namespace {

constexpr size_t kStreamAlignment = 64;

size_t stream_bytes(const KvGroupLayout& layout, KvCodec codec) {
  const size_t rows = static_cast<size_t>(layout.num_kv_heads) * layout.page_size;
  const size_t bytes = layout.params_offset(codec) + (kv_codec_has_params(codec) ? rows * 2 * sizeof(uint16_t) : 0);
  return (bytes + kStreamAlignment - 1) / kStreamAlignment * kStreamAlignment;
}

}  // namespace

const char* kv_codec_name(KvCodec codec) {
  switch (codec) {
    case KvCodec::kF32:
      return "fp32";
    case KvCodec::kBF16:
      return "bf16";
    case KvCodec::kF16:
      return "fp16";
    case KvCodec::kInt8:
      return "int8";
    case KvCodec::kInt4Rotated:
      return "int4";
    case KvCodec::kInt4Plain:
      return "int4-plain";
    case KvCodec::kE4M3:
      return "fp8";
  }
  return "?";
}

KvCodec parse_kv_codec(const std::string& name) {
  for (KvCodec codec : {KvCodec::kF32, KvCodec::kBF16, KvCodec::kF16, KvCodec::kInt8, KvCodec::kInt4Rotated,
                        KvCodec::kInt4Plain, KvCodec::kE4M3})
    if (name == kv_codec_name(codec)) return codec;
  throw_value_error("kv codec: got '", name, "', wanted fp32, bf16, fp16, fp8, int8, int4 or int4-plain");
}

bool kv_codec_has_params(KvCodec codec) {
  return codec == KvCodec::kInt8 || codec == KvCodec::kInt4Rotated || codec == KvCodec::kInt4Plain;
}

bool kv_codec_rotates(KvCodec codec) { return codec == KvCodec::kInt4Rotated; }

int kv_rotation_size(int head_dim) {
  int size = 1;
  while (size < 256 && head_dim % (size * 2) == 0) size *= 2;
  return size;
}

size_t kv_row_bytes(KvCodec codec, int head_dim) {
  switch (codec) {
    case KvCodec::kF32:
      return static_cast<size_t>(head_dim) * 4;
    case KvCodec::kBF16:
    case KvCodec::kF16:
      return static_cast<size_t>(head_dim) * 2;
    case KvCodec::kInt8:
    case KvCodec::kE4M3:
      return static_cast<size_t>(head_dim);
    case KvCodec::kInt4Rotated:
    case KvCodec::kInt4Plain:
      return static_cast<size_t>(head_dim) / 2;
  }
  return 0;
}

void KvGroupLayout::check() const {
  PARTITA_CHECK(num_layers >= 1, "num_layers: got ", num_layers, ", wanted at least 1");
  PARTITA_CHECK(num_kv_heads >= 1, "num_kv_heads: got ", num_kv_heads, ", wanted at least 1");
  PARTITA_CHECK(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0, "head_dim: got ", head_dim,
                ", wanted a multiple of 8 from 8 to 256");
  PARTITA_CHECK(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128, "page_size: got ", page_size,
                ", wanted 16, 32, 64 or 128 tokens");
  PARTITA_CHECK(window >= 0, "window: got ", window, ", wanted 0 (all) or a positive number of tokens");
}

size_t KvGroupLayout::params_offset(KvCodec codec) const {
  return static_cast<size_t>(num_kv_heads) * page_size * kv_row_bytes(codec, head_dim);
}
size_t KvGroupLayout::k_stream_bytes() const { return stream_bytes(*this, k_codec); }
size_t KvGroupLayout::v_stream_bytes() const { return stream_bytes(*this, v_codec); }
size_t KvGroupLayout::layer_bytes() const { return k_stream_bytes() + v_stream_bytes(); }
size_t KvGroupLayout::page_bytes() const { return layer_bytes() * num_layers; }
size_t KvGroupLayout::k_offset(int layer) const { return layer_bytes() * layer; }
size_t KvGroupLayout::v_offset(int layer) const { return layer_bytes() * layer + k_stream_bytes(); }

}  // namespace partita
