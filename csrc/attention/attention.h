// Paged attention on the CPU: append (qk-norm + RoPE + rotate + quantise + write into pages), plan, attend.
// The contract of this folder.
//
// Attention reads K and V only as they lie in pages, its own chunk included; KV splits lie at fixed absolute
// positions; prefill and decode share one arithmetic. So a token's output does not depend on chunk sizes, cache hits,
// the batch, or the number of workers (bit for bit on one instruction set; pages are the same bytes on all of them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "rope/rope.h"

namespace partita {

// kE4M3 is float8_e4m3fn without a scale: rounded to nearest even, what is larger than 448 stored as +-448, NaN as NaN.
enum class KvCodec : uint8_t { kF32, kBF16, kF16, kInt8, kInt4Rotated, kInt4Plain, kE4M3 };
const char* kv_codec_name(KvCodec codec);  // "fp32", "bf16", "fp16", "int8", "int4", "int4-plain", "fp8"
KvCodec parse_kv_codec(const std::string& name);
bool kv_codec_has_params(KvCodec codec);  // integer codes with an fp16 (scale, min) per (token, head)
// The stream holds H x instead of x, H the orthonormal block Hadamard matrix of kv_rotation_size(head_dim).
bool kv_codec_rotates(KvCodec codec);
int kv_rotation_size(int head_dim);                // the largest power of two that divides head_dim, at most 256
size_t kv_row_bytes(KvCodec codec, int head_dim);  // codes of one (token, head)

// The byte image of one KV group's page, the same on CPU, GPU and disk:
//   for each layer of the group: K stream, then V stream; each stream is
//     codes  [num_kv_heads, page_size, code_bytes(head_dim)]     elements in linear order; int4: element 2i is the low
//     nibble params [num_kv_heads, page_size, 2] fp16 (scale, min)      integer codecs only
//   value = code * scale + min;  code = round_to_nearest_even((x - min) / scale) with scale and min as stored.
// Streams start at multiples of 64 bytes.
struct KvGroupLayout {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int page_size = 64;  // tokens: 16, 32, 64, 128
  KvCodec k_codec = KvCodec::kBF16;
  KvCodec v_codec = KvCodec::kBF16;
  int window = 0;  // tokens a query sees, itself included; 0 = all

  void check() const;  // throws ValueError
  size_t k_stream_bytes() const;
  size_t v_stream_bytes() const;
  size_t layer_bytes() const;
  size_t page_bytes() const;
  size_t k_offset(int layer) const;  // of the stream, from the page's first byte
  size_t v_offset(int layer) const;
  size_t params_offset(KvCodec codec) const;  // from the stream's first byte
};

// One step's rows, shared by all layers of a group. Requests in any order, prefill and decode mixed.
struct AttentionBatch {
  int64_t num_tokens = 0;                   // T
  int num_requests = 0;                     // R
  const int32_t* cu_seqlens_q = nullptr;    // [R + 1] token rows of each request
  const int32_t* context_starts = nullptr;  // [R] absolute position of each request's first token here
  const int32_t* const* page_tables =
      nullptr;                  // [R] -> page ids, entry p holds positions [p*page_size, (p+1)*page_size)
  std::byte* arena = nullptr;   // page p starts at arena + p * arena_page_bytes
  size_t arena_page_bytes = 0;  // >= layout.page_bytes()
};

struct AttentionParams {
  const KvGroupLayout* layout = nullptr;
  int layer = 0;                         // within the group
  int num_q_heads = 0;                   // Hq, a multiple of num_kv_heads
  const RopeTable* rope = nullptr;       // null: positions are not rotated
  const float* q_norm_weight = nullptr;  // [D] RMS norm of each head before RoPE, or null
  const float* k_norm_weight = nullptr;  // [D]
  float norm_eps = 1e-6f;
  float scale = 0;         // of the scores, e.g. 1/sqrt(D)
  float soft_cap = 0;      // cap * tanh(score / cap); 0 = none
  bool exact = false;      // fp32 arithmetic throughout (the reference); else integer codecs may use
                           // 16-bit fixed-point q and p with exact integer sums
  float* qkv = nullptr;    // [T, (Hq + 2*Hkv) * D] fp32; append overwrites the q part: normed, roped, rotated
  int64_t qkv_stride = 0;  // floats
  float* out = nullptr;    // [T, Hq * D] fp32
  int64_t out_stride = 0;  // floats
};

// Throws ValueError naming the argument: shapes, pointers, positions past the rotary table ... Page ids are only
// checked to be non-negative. Not called by the functions below, which trust their arguments: call it where arguments
// enter.
void check_attention(const AttentionParams& params, const AttentionBatch& batch);

// Append: chunks are runs of token rows; must be complete before attend starts. Pages need no preparation: attention
// reads no slot past a request's last token.
int64_t append_num_chunks(const AttentionParams& params, const AttentionBatch& batch);
size_t append_scratch_bytes(const AttentionParams& params);
void append_run_chunk(const AttentionParams& params, const AttentionBatch& batch, int64_t chunk, std::byte* scratch);

// The step's work items, made once per step and group and used by every layer. Reuses its memory between steps.
class AttentionPlan {
 public:
  AttentionPlan();
  ~AttentionPlan();
  AttentionPlan(AttentionPlan&&) noexcept;
  AttentionPlan& operator=(AttentionPlan&&) noexcept;

  void build(const KvGroupLayout& layout, int num_q_heads, const AttentionBatch& batch);
  int64_t num_chunks() const;
  // Bytes that all workers share during one attend (split results and their counters); caller-owned, 64-byte aligned.
  size_t workspace_bytes() const;
  // The counters are the workspace's first bytes, always as many: zero them once when the workspace is allocated;
  // attend leaves them zero, whatever plans use it in turn.
  size_t counter_bytes() const;
  size_t worker_scratch_bytes() const;  // 64-byte aligned
  struct Item;                          // defined in attention_plan.h
  const Item& item(int64_t chunk) const;
  double score_pairs() const;  // sum over query tokens of the KV tokens each sees; costs 4 * Hq * D operations a layer

 private:
  struct Tile {  // query rows that share their pass over K and V
    int32_t request, token_begin, token_end, first_split, num_splits;
    float cost;
  };
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  size_t workspace_bytes_ = 0;
  size_t worker_scratch_bytes_ = 0;
  double score_pairs_ = 0;
};

// The most that worker_scratch_bytes() can be.
size_t max_attend_scratch_bytes(const KvGroupLayout& layout, int num_q_heads);

// next_chunk: what this worker will probably run afterwards, whose first K and V are fetched towards the end of this
// chunk. A wrong guess costs a little bandwidth; -1, or a number past the last chunk: nothing follows.
void attend_run_chunk(const AttentionParams& params, const AttentionBatch& batch, const AttentionPlan& plan,
                      int64_t chunk, int64_t next_chunk, std::byte* workspace, std::byte* scratch);

// Rows to codes and back, as append writes them: rotated codecs rotate before encoding and rotate back after decoding.
// x: [num_rows, D]   codes: [num_rows, kv_row_bytes]   params: [num_rows, 2] fp16 bits, unused by float codecs
void encode_kv_rows(KvCodec codec, const float* x, int64_t num_rows, int head_dim, std::byte* codes, uint16_t* params);
void decode_kv_rows(KvCodec codec, const std::byte* codes, const uint16_t* params, int64_t num_rows, int head_dim,
                    float* x);
// One head of one stream of one page as values.  out: [page_size, D]
void decode_page_stream(const KvGroupLayout& layout, const std::byte* page, int layer, int kv_head, bool is_key,
                        float* out);

}  // namespace partita
