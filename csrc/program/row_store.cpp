#include "program/row_store.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace partita {

RowStore::RowStore(int num_rows, int64_t max_tokens, int num_groups, int page_size, int64_t vocab_size,
                   std::shared_ptr<Gpu> gpu)
    : num_rows_(num_rows),
      max_tokens_(max_tokens),
      num_groups_(num_groups),
      page_size_(page_size),
      vocab_size_(vocab_size),
      gpu_(std::move(gpu)) {
  PARTITA_CHECK(num_rows > 0, "num_rows: got ", num_rows, ", wanted a positive number");
  PARTITA_CHECK(max_tokens > 0, "max_tokens: got ", max_tokens, ", wanted a positive number");
  PARTITA_CHECK(num_groups > 0, "num_groups: got ", num_groups, ", wanted a positive number");
  PARTITA_CHECK(page_size > 0, "page_size: got ", page_size, ", wanted a positive number");
  max_pages_ = (max_tokens + page_size - 1) / page_size;
  const size_t token_bytes = sizeof(int32_t) * num_rows_ * tokens_stride();
  if (gpu_) {
    pinned_tokens_ = GpuPinnedBuffer(gpu_, token_bytes);
    tokens_ = pinned_tokens_.as<int32_t>();
    device_tokens_ = GpuBuffer(gpu_, token_bytes, "tokens of all rows");
    device_sampling_ = std::make_unique<GpuSamplingRows>(gpu_, num_rows_, vocab_size_);
  } else {
    token_memory_ = AlignedBuffer(token_bytes);
    tokens_ = token_memory_.as<int32_t>();
  }
  num_known_tokens_.assign(num_rows_, 0);
  is_admitted_.assign(num_rows_, false);
  page_tables_ = AlignedBuffer(sizeof(int32_t) * num_groups_ * num_rows_ * max_pages_);
  num_pages_.assign(static_cast<size_t>(num_groups_) * num_rows_, 0);
  num_prompt_tokens_.assign(num_rows_, 0);
  sampling_.resize(num_rows_);
}

void RowStore::check_row(int row) const {
  PARTITA_CHECK(row >= 0 && row < num_rows_, "row: got ", row, ", wanted 0 to ", num_rows_ - 1);
}

void RowStore::admit(int row, const int32_t* tokens_in, int64_t num_tokens, int64_t num_prompt_tokens,
                     SamplingParams sampling) {
  check_row(row);
  PARTITA_CHECK(num_tokens > 0 && num_tokens <= max_tokens_, "tokens: got ", num_tokens, " of them, wanted 1 to ",
                max_tokens_);
  PARTITA_CHECK(num_prompt_tokens > 0 && num_prompt_tokens <= num_tokens, "num_prompt_tokens: got ", num_prompt_tokens,
                ", wanted 1 to ", num_tokens);
  for (int64_t i = 0; i < num_tokens; ++i)
    PARTITA_CHECK(tokens_in[i] >= 0 && tokens_in[i] < vocab_size_, "tokens[", i, "]: got id ", tokens_in[i],
                  ", wanted 0 to ", vocab_size_ - 1);
  check_sampling(sampling);
  std::copy_n(tokens_in, num_tokens, tokens(row));
  tokens(row)[num_tokens] = -1;  // no successor known
  num_prompt_tokens_[row] = num_prompt_tokens;
  sampling_[row] = std::move(sampling);
  num_known_tokens_[row] = num_tokens;
  {
    const std::lock_guard<std::mutex> lock(upload_mutex_);
    is_admitted_[row] = true;
  }
  for (int group = 0; group < num_groups_; ++group) num_pages_[group * num_rows_ + row] = 0;
}

void RowStore::check_sampling(const SamplingParams& sampling) const {
  sampling.check(vocab_size_);
  if (!gpu_) return;
  const GpuSamplingCapacity& capacity = device_sampling_->capacity();
  PARTITA_CHECK(sampling.num_logprobs <= kMaxTopLogprobs, "logprobs: got ", sampling.num_logprobs, ", wanted at most ",
                kMaxTopLogprobs, " on a GPU");
  PARTITA_CHECK(static_cast<int>(sampling.stop_token_ids.size()) <= capacity.max_stop_token_ids, "stop_token_ids: got ",
                sampling.stop_token_ids.size(), " of them, wanted at most ", capacity.max_stop_token_ids, " on a GPU");
  PARTITA_CHECK(static_cast<int>(sampling.logit_bias.size()) <= capacity.max_logit_biases, "logit_bias: got ",
                sampling.logit_bias.size(), " tokens, wanted at most ", capacity.max_logit_biases, " on a GPU");
}

void RowStore::upload_if_admitted(int row, GpuStream stream) {
  const std::lock_guard<std::mutex> lock(upload_mutex_);
  if (!is_admitted_[row]) return;
  is_admitted_[row] = false;
  // One entry more than is known: no successor.
  gpu_->copy(device_tokens() + row * tokens_stride(), tokens(row), sizeof(int32_t) * (num_known_tokens_[row] + 1),
             GpuCopy::kHostToDevice, stream);
  device_sampling_->set(row, sampling_[row], num_prompt_tokens_[row], stream);
}

void RowStore::set_pages(int row, int group, int64_t first_page_idx, const int32_t* pages, int64_t num_pages,
                         int64_t num_arena_pages) {
  check_row(row);
  PARTITA_CHECK(group >= 0 && group < num_groups_, "group: got ", group, ", wanted 0 to ", num_groups_ - 1);
  PARTITA_CHECK(first_page_idx >= 0 && first_page_idx + num_pages <= max_pages_, "pages: got entries ", first_page_idx,
                " to ", first_page_idx + num_pages, ", wanted at most ", max_pages_);
  int32_t* table = page_tables_.as<int32_t>() + (static_cast<int64_t>(group) * num_rows_ + row) * max_pages_;
  for (int64_t i = 0; i < num_pages; ++i) {
    PARTITA_CHECK(pages[i] >= 0 && pages[i] < num_arena_pages, "pages[", i, "]: got id ", pages[i], ", wanted 0 to ",
                  num_arena_pages - 1);
    table[first_page_idx + i] = pages[i];
  }
  num_pages_[group * num_rows_ + row] = first_page_idx + num_pages;
}

}  // namespace partita
