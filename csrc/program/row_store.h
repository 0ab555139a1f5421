// Persistent per-request state, one row for a request's life: its tokens, sampling parameters, page tables.
//
// On a GPU the device holds a copy of the tokens and parameters: sampling writes the tokens there, and the host's
// follow when a range is over.
//
// Threads: the engine thread writes a row at admission, when no plan in flight names it, and appends pages
// beyond those any plan in flight reads; workers append sampled tokens. Nothing here reallocates.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/gpu.h"
#include "sampling/sampling.h"
#include "sampling/sampling_gpu.h"

namespace partita {

class RowStore {
 public:
  // max_tokens: positions a row can hold (prompt and output); vocab_size bounds the ids.
  // gpu: the device that holds a copy; null: steps run on the CPU.
  RowStore(int num_rows, int64_t max_tokens, int num_groups, int page_size, int64_t vocab_size,
           std::shared_ptr<Gpu> gpu = nullptr);

  const std::shared_ptr<Gpu>& gpu() const { return gpu_; }
  int num_rows() const { return num_rows_; }
  int64_t max_tokens() const { return max_tokens_; }
  int64_t max_pages() const { return max_pages_; }
  int page_size() const { return page_size_; }
  int64_t vocab_size() const { return vocab_size_; }

  // Starts a row anew: its known tokens (prompt, then output if it was preempted) and its parameters.
  // Throws ValueError: row or a token id out of range, more tokens than a row holds, bad sampling parameters.
  void admit(int row, const int32_t* tokens, int64_t num_tokens, int64_t num_prompt_tokens, SamplingParams sampling);
  // Replaces (first_page_idx 0) or extends the page table of one KV group.
  void set_pages(int row, int group, int64_t first_page_idx, const int32_t* pages, int64_t num_pages,
                 int64_t num_arena_pages);

  // Throws ValueError naming the field: parameters out of range, or more of them than this device takes.
  void check_sampling(const SamplingParams& sampling) const;

  int32_t* tokens(int row) const { return tokens_ + row * tokens_stride(); }  // [max_tokens + 1]
  int64_t tokens_stride() const { return max_tokens_ + 1; }
  const int32_t* page_table(int row, int group) const {  // [max_pages]
    return page_tables_.as<int32_t>() + (static_cast<int64_t>(group) * num_rows_ + row) * max_pages_;
  }
  int64_t num_pages(int row, int group) const { return num_pages_[group * num_rows_ + row]; }
  int64_t num_prompt_tokens(int row) const { return num_prompt_tokens_[row]; }
  const SamplingParams& sampling(int row) const { return sampling_[row]; }
  void check_row(int row) const;

  // On a GPU: the device's copies, which the kernels of a step read and write.
  int32_t* device_tokens() const { return device_tokens_.as<int32_t>(); }  // [num_rows, max_tokens + 1]
  const GpuSamplingRows& device_sampling() const { return *device_sampling_; }
  // Enqueues the upload of a row that was admitted since the last call. A lane's thread calls it for every row of a
  // step that it launches; no other step that names the row may be in flight then.
  void upload_if_admitted(int row, GpuStream stream);

 private:
  int num_rows_;
  int64_t max_tokens_;
  int num_groups_;
  int page_size_;
  int64_t max_pages_;
  int64_t vocab_size_;
  std::shared_ptr<Gpu> gpu_;
  int32_t* tokens_ = nullptr;      // [num_rows, max_tokens + 1], in one of:
  AlignedBuffer token_memory_;     // CPU
  GpuPinnedBuffer pinned_tokens_;  // GPU: uploaded from where it lies
  GpuBuffer device_tokens_;        // GPU: the same shape
  std::unique_ptr<GpuSamplingRows> device_sampling_;
  std::mutex upload_mutex_;                // guards is_admitted_ and device_sampling_
  std::vector<int64_t> num_known_tokens_;  // at admission
  std::vector<bool> is_admitted_;          // and not yet uploaded
  AlignedBuffer page_tables_;              // [num_groups, num_rows, max_pages]
  std::vector<int64_t> num_pages_;
  std::vector<int64_t> num_prompt_tokens_;
  std::vector<SamplingParams> sampling_;
};

}  // namespace partita
