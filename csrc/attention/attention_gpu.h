// Paged attention on a GPU: append (qk-norm + RoPE + rotate + quantise + write into pages), plan, attend. The contract
// of this folder's GPU half; pages, codecs and layouts are those of attention.h, byte for byte.
//
// Attention reads K and V only as they lie in pages, its own chunk included. Unless a plan is batch invariant, where KV
// is split depends on the step, so a token's output may differ by rounding between batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "core/dtype.h"
#include "core/gpu.h"

namespace partita {

// Cosines and sines in device memory, as RopeTable (rope/rope.h) holds them on the host.
struct GpuRopeTable {
  const float* cos = nullptr;  // [num_positions, rotary_dim / 2]; null: positions are not rotated
  const float* sin = nullptr;  // [num_positions, rotary_dim / 2]
  int rotary_dim = 0;
  int64_t num_positions = 0;
};

// One step's rows, shared by all layers of a group. Requests in any order, prefill and decode mixed. Every pointer is
// device memory, written before the launch on the same stream. A padded row (a captured graph runs more rows than the
// step has) has position -1: nothing is written for it and nothing of it is read.
struct GpuAttentionBatch {
  int64_t num_tokens = 0;                    // T, padded rows included
  int num_requests = 0;                      // R, padded requests included
  const int32_t* token_positions = nullptr;  // [T] absolute; -1: padded
  const int32_t* token_requests = nullptr;   // [T] 0..R-1
  const int32_t* cu_seqlens_q = nullptr;     // [R + 1] token rows of each request; append and attend do without
  const int32_t* context_starts = nullptr;   // [R] absolute position of each request's first token here; -1: padded
  const int32_t* page_tables = nullptr;      // [R, page_table_stride] page ids; entry p holds positions
                                             // [p * page_size, (p + 1) * page_size)
  int64_t page_table_stride = 0;
  std::byte* arena = nullptr;   // page p starts at arena + p * arena_page_bytes; both multiples of 16
  size_t arena_page_bytes = 0;  // >= layout.page_bytes()
};

struct GpuAttentionParams {
  const KvGroupLayout* layout = nullptr;  // host memory
  int layer = 0;                          // within the group
  int num_q_heads = 0;                    // Hq, a multiple of num_kv_heads
  GpuRopeTable rope;
  const float* q_norm_weight = nullptr;  // [D] RMS norm of each head before RoPE, or null
  const float* k_norm_weight = nullptr;  // [D]
  float norm_eps = 1e-6f;
  float scale = 0;      // of the scores, e.g. 1/sqrt(D)
  float soft_cap = 0;   // cap * tanh(score / cap); 0 = none
  bool exact = false;   // fp32 arithmetic throughout, naive kernels
  void* qkv = nullptr;  // [T, (Hq + 2*Hkv) * D]; append overwrites the q part: normed, roped, rotated where K is
  DType qkv_type = DType::kBF16;  // f32, f16 or bf16; exact: f32
  int64_t qkv_stride = 0;         // elements
  void* out = nullptr;            // [T, Hq * D]
  DType out_type = DType::kBF16;  // f32, f16 or bf16
  int64_t out_stride = 0;         // elements
  int num_ctas = 0;               // most thread blocks to use (soft partition); 0: as many as the chip runs at once
};

// Throws ValueError naming the argument. Device memory is not looked into.
void check_attention_gpu(const GpuAttentionParams& params, const GpuAttentionBatch& batch);

// Enqueued on the stream; must be complete before attend starts, as the same stream's order gives.
void append_gpu(Gpu& gpu, const GpuAttentionParams& params, const GpuAttentionBatch& batch, GpuStream stream);

// Requests [first_request, first_request + num_requests) begin with the same pages: their first num_tokens positions (a
// multiple of the page size, before every query of the step) are read once for all of their query rows together.
struct GpuSharedPrefix {
  int first_request = 0, num_requests = 0;
  int64_t num_tokens = 0;
};

struct GpuPlanOptions {
  int num_ctas = 0;                 // most thread blocks to use; 0: as many as the chip runs at once
  bool is_batch_invariant = false;  // splits at fixed absolute positions, one kernel for every row
  // > 0: a plan for a captured decode graph of this many requests of one token each. Table and workspace sizes and the
  // launch grids then depend on this number (and max_context where batch invariant) alone; what the step holds is read
  // from the tables on the device.
  int graph_rows = 0;
  int64_t max_context = 0;  // most positions of a request; only a batch invariant graph needs it
  std::vector<GpuSharedPrefix> shared_prefixes;
};

// What a plan is made for: decides which kernels run.
struct GpuAttentionDesc {
  KvGroupLayout layout;
  int num_q_heads = 0;
  DType qkv_type = DType::kBF16;
  bool exact = false;
};

struct AttendDecodeKernel;  // attention/attend_gpu_kernels.h
struct AttendPrefillKernel;
struct AttendMergeKernel;
struct AttendNaiveKernel;

// The kernels that serve a desc. decode and prefill are null where the naive kernel does.
struct AttendSelection {
  const AttendDecodeKernel* decode = nullptr;
  int decode_columns = 0;  // most query rows of a decode tile, 8 or 16: as shared memory allows
  const AttendPrefillKernel* prefill = nullptr;
  const AttendMergeKernel* merge = nullptr;
  const AttendNaiveKernel* naive = nullptr;
  std::string reasons;  // one line for each candidate: taken, or why not
};
AttendSelection select_attend(const Gpu& gpu, const GpuAttentionDesc& desc);

// The step's work, made once per step and group on the host and used by every layer.
class GpuAttentionPlan {
 public:
  GpuAttentionPlan(std::shared_ptr<Gpu> gpu, const GpuAttentionDesc& desc);

  // cu_seqlens_q: [num_requests + 1], context_starts: [num_requests] host memory, as the batch holds them on the
  // device. A request with a negative context start is padding. Throws ValueError naming the argument.
  void build(int num_requests, const int32_t* cu_seqlens_q, const int32_t* context_starts,
             const GpuPlanOptions& options = {});

  // What the caller uploads before the first layer, to an address that is a multiple of 16.
  const std::vector<int32_t>& tables() const { return tables_; }
  // Device memory for one attend, a multiple of 256; holds nothing between launches. 0: none is needed.
  size_t workspace_bytes() const { return workspace_bytes_; }

  // The most that tables() and workspace_bytes() can be for steps of up to so many tokens and requests, whose contexts
  // have up to max_context positions.
  size_t max_table_entries(int64_t max_tokens, int64_t max_requests, int64_t max_context,
                           const GpuPlanOptions& options) const;
  size_t max_workspace_bytes(int64_t max_tokens, int64_t max_requests, int64_t max_context,
                             const GpuPlanOptions& options) const;

  const Gpu& gpu() const { return *gpu_; }
  const GpuAttentionDesc& desc() const { return desc_; }
  const AttendSelection& selection() const { return selection_; }
  std::string describe() const;  // the kernels with reasons, and what the last build made

  // One launch over a list of items: the grid, and where its tables lie in tables().
  struct Launch {
    int num_ctas = 0;     // 0: no launch
    int num_columns = 0;  // decode: query rows of a tile, 8 or 16
    int64_t queues = 0;   // [num_ctas + 1] first item of each thread block
    int64_t items = 0;    // [num_items] GpuAttendItem
  };
  struct MergeLaunch {
    int num_ctas = 0;
    int64_t count = 0;   // [1] merges
    int64_t merges = 0;  // [count] GpuAttendMerge
    int64_t parts = 0;   // [...] first partial row of each part
  };
  const Launch& decode() const { return decode_; }
  const Launch& prefill() const { return prefill_; }
  const MergeLaunch& merge() const { return merge_; }
  int64_t num_partial_rows() const { return num_partial_rows_; }

 private:
  struct Tile;
  struct Builder;
  std::shared_ptr<Gpu> gpu_;
  GpuAttentionDesc desc_;
  AttendSelection selection_;
  std::vector<int32_t> tables_;
  size_t workspace_bytes_ = 0;
  Launch decode_, prefill_;
  MergeLaunch merge_;
  int64_t num_partial_rows_ = 0;
  int64_t num_items_ = 0, num_merges_ = 0;
};

// Attends every row of the batch; rows of padding are left as they are. plan: built for this step; device_tables: its
// tables(), uploaded. Returns before the kernels have run.
void attend_gpu(Gpu& gpu, const GpuAttentionParams& params, const GpuAttentionBatch& batch,
                const GpuAttentionPlan& plan, const int32_t* device_tables, std::byte* workspace, GpuStream stream);

}  // namespace partita
