#include "sampling/sampling_gpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "core/check.h"
#include "core/gpu_library.h"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace {

constexpr int kBlocksPerSm = 2;       // of the scanning kernels: 512 threads, 64 registers
constexpr int kMaxLogitRows = 65535;  // blockIdx.y

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Blocks per row: one wave of them over the chip where rows are few.
int num_splits_of(const Gpu& gpu, int num_logit_rows, int64_t vocab_size) {
  const int64_t fit_chip = kBlocksPerSm * gpu.properties().num_sms / std::max(num_logit_rows, 1);
  const int64_t fit_row = (vocab_size + kMinSplitLogits - 1) / kMinSplitLogits;
  return static_cast<int>(std::clamp<int64_t>(std::min(fit_chip, fit_row), 1, kMaxSplits));
}

SamplingWorkspaceLayout lay_out(const Gpu& gpu, std::byte* base, int max_logit_rows, int64_t vocab_size,
                                int64_t max_tokens, const GpuSamplingCapacity& capacity, size_t* num_bytes) {
  int64_t max_splits = 1;  // of all rows together
  for (int rows = 1; rows <= max_logit_rows; ++rows)
    max_splits = std::max<int64_t>(max_splits, int64_t{rows} * num_splits_of(gpu, rows, vocab_size));
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = base ? reinterpret_cast<Element*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(Element)), 256);
  };
  SamplingWorkspaceLayout layout{};
  layout.max_touched = std::min(vocab_size, max_tokens + capacity.max_stop_token_ids + capacity.max_logit_biases);
  layout.table_size = 2;
  layout.table_shift = 31;
  while (layout.table_size < 2 * layout.max_touched) {
    layout.table_size *= 2;
    --layout.table_shift;
  }
  take(layout.tickets, max_logit_rows);
  take(layout.list_sizes, max_logit_rows);
  take(layout.history, max_logit_rows * layout.table_size);
  take(layout.progress, max_logit_rows);
  take(layout.best, max_splits);
  take(layout.maxima, max_splits * kSamplingThreads);
  take(layout.segment_sums, max_splits * kSamplingWarps);
  take(layout.segment_counts, max_splits * kSamplingWarps);
  take(layout.histograms, max_splits * kNumSamplingBins);
  take(layout.lists, int64_t{max_logit_rows} * kListCapacity);
  take(layout.num_touched, max_logit_rows);
  take(layout.touched, max_logit_rows * layout.max_touched);
  if (num_bytes) *num_bytes = used;
  return layout;
}

void check_vocab_size(int64_t vocab_size) {
  PARTITA_CHECK(vocab_size > 0 && vocab_size <= kMaxGpuVocabSize, "vocab_size: got ", vocab_size, ", wanted 1 to ",
                kMaxGpuVocabSize);
}

void check_rows(int num_logit_rows, int64_t vocab_size, int64_t logits_stride) {
  check_vocab_size(vocab_size);
  PARTITA_CHECK(num_logit_rows >= 0 && num_logit_rows <= kMaxLogitRows, "num_logit_rows: got ", num_logit_rows,
                ", wanted 0 to ", kMaxLogitRows);
  PARTITA_CHECK(logits_stride >= vocab_size, "logits_stride: got ", logits_stride,
                ", wanted at least the vocabulary's ", vocab_size);
}

void check_given(const void* pointer, const char* name) { PARTITA_CHECK(pointer != nullptr, name, ": got none"); }

template <typename Kernel>
const Kernel& kernel_of(const Gpu& gpu) {
  const Kernel* kernel = kernels_of(gpu).only<Kernel>();
  if (!kernel)
    throw std::runtime_error(concat("the ", gpu.properties().world, " library has no ", Kernel::kFamily, " kernel"));
  return *kernel;
}

}  // namespace

GpuSamplingFeatures GpuSamplingFeatures::of(const SamplingParams& params) {
  GpuSamplingFeatures features;
  features.adjusts = !params.logit_bias.empty() || (params.min_tokens > 0 && !params.stop_token_ids.empty()) ||
                     params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
                     params.frequency_penalty != 0.0f;
  features.draws = params.temperature >= kGreedyTemperature;
  features.logprobs = params.num_logprobs >= 0;
  return features;
}

GpuSamplingRows::GpuSamplingRows(std::shared_ptr<Gpu> gpu, int num_rows, int64_t vocab_size,
                                 const GpuSamplingCapacity& capacity)
    : gpu_(std::move(gpu)), num_rows_(num_rows), vocab_size_(vocab_size), capacity_(capacity) {
  PARTITA_CHECK(gpu_ != nullptr, "gpu: got none");
  PARTITA_CHECK(num_rows > 0, "num_rows: got ", num_rows, ", wanted at least 1");
  check_vocab_size(vocab_size);
  PARTITA_CHECK(capacity.max_stop_token_ids >= 0, "max_stop_token_ids: got ", capacity.max_stop_token_ids,
                ", wanted at least 0");
  PARTITA_CHECK(capacity.max_logit_biases >= 0, "max_logit_biases: got ", capacity.max_logit_biases,
                ", wanted at least 0");
  view_.stop_token_ids_offset = sizeof(GpuSamplingRow);
  view_.logit_bias_offset = view_.stop_token_ids_offset + round_up(capacity.max_stop_token_ids * sizeof(int32_t), 8);
  view_.record_bytes = round_up(view_.logit_bias_offset + capacity.max_logit_biases * sizeof(GpuLogitBias), 16);
  const size_t bytes = static_cast<size_t>(num_rows * view_.record_bytes);
  records_ = GpuBuffer(gpu_, bytes, "sampling rows");
  view_.records = records_.data();
  staging_ = static_cast<std::byte*>(gpu_->allocate_pinned(bytes));
  gpu_->fill(records_.data(), 0, bytes, gpu_->default_stream());
  gpu_->synchronize(gpu_->default_stream());
}

GpuSamplingRows::~GpuSamplingRows() {
  if (staging_) gpu_->release_pinned(staging_);
}

void GpuSamplingRows::set(int row, const SamplingParams& params, int64_t num_prompt_tokens, GpuStream stream) {
  PARTITA_CHECK(row >= 0 && row < num_rows_, "row: got ", row, ", wanted 0 to ", num_rows_ - 1);
  PARTITA_CHECK(num_prompt_tokens >= 0, "num_prompt_tokens: got ", num_prompt_tokens, ", wanted at least 0");
  params.check(vocab_size_);
  PARTITA_CHECK(params.num_logprobs <= kMaxTopLogprobs, "num_logprobs: got ", params.num_logprobs, ", wanted at most ",
                kMaxTopLogprobs, " on a GPU");
  std::vector<int32_t> stop_token_ids = params.stop_token_ids;  // each once: one thread masks it
  std::sort(stop_token_ids.begin(), stop_token_ids.end());
  stop_token_ids.erase(std::unique(stop_token_ids.begin(), stop_token_ids.end()), stop_token_ids.end());
  PARTITA_CHECK(static_cast<int64_t>(stop_token_ids.size()) <= capacity_.max_stop_token_ids, "stop_token_ids: got ",
                stop_token_ids.size(), " ids, wanted at most ", capacity_.max_stop_token_ids, " on a GPU");
  PARTITA_CHECK(static_cast<int64_t>(params.logit_bias.size()) <= capacity_.max_logit_biases, "logit_bias: got ",
                params.logit_bias.size(), " entries, wanted at most ", capacity_.max_logit_biases, " on a GPU");
  std::vector<GpuLogitBias> logit_bias;
  for (const auto& [token, bias] : params.logit_bias) logit_bias.push_back({token, bias});
  std::stable_sort(logit_bias.begin(), logit_bias.end(),
                   [](const GpuLogitBias& a, const GpuLogitBias& b) { return a.token < b.token; });

  GpuSamplingRow packed{};
  packed.is_greedy = params.temperature < kGreedyTemperature;
  packed.inverse_temperature = packed.is_greedy ? 1.0f : 1.0f / params.temperature;
  packed.top_p = params.top_p;
  packed.min_p = params.min_p;
  if (!packed.is_greedy && params.top_p < 1.0f) {
    // Tokens lighter than (1 - p) / V of the largest weigh less than (1 - p) of the total together: top_p cuts above.
    const double exponents =
        std::log(static_cast<double>(vocab_size_)) - std::log(1.0 - static_cast<double>(params.top_p));
    packed.bins_per_logit =
        static_cast<float>((kNumSamplingBins - 1) / (std::max(exponents, 1e-3) * params.temperature));
  }
  packed.presence_penalty = params.presence_penalty;
  packed.frequency_penalty = params.frequency_penalty;
  packed.repetition_penalty = params.repetition_penalty;
  packed.seed = params.seed;
  packed.num_prompt_tokens = num_prompt_tokens;
  packed.top_k = params.top_k < vocab_size_ ? params.top_k : 0;
  packed.num_logprobs = static_cast<int32_t>(std::min<int64_t>(params.num_logprobs, vocab_size_));
  packed.min_tokens = params.min_tokens;
  packed.num_stop_token_ids = static_cast<int32_t>(stop_token_ids.size());
  packed.num_logit_biases = static_cast<int32_t>(logit_bias.size());

  std::byte* record = staging_ + row * view_.record_bytes;
  std::memset(record, 0, view_.record_bytes);
  std::memcpy(record, &packed, sizeof packed);
  std::copy(stop_token_ids.begin(), stop_token_ids.end(),
            reinterpret_cast<int32_t*>(record + view_.stop_token_ids_offset));
  std::copy(logit_bias.begin(), logit_bias.end(), reinterpret_cast<GpuLogitBias*>(record + view_.logit_bias_offset));
  gpu_->copy(records_.data() + row * view_.record_bytes, record, view_.record_bytes, GpuCopy::kHostToDevice, stream);
}

size_t sample_gpu_workspace_bytes(const Gpu& gpu, int max_logit_rows, int64_t vocab_size, int64_t max_tokens,
                                  const GpuSamplingCapacity& capacity) {
  check_vocab_size(vocab_size);
  PARTITA_CHECK(max_logit_rows > 0 && max_logit_rows <= kMaxLogitRows, "max_logit_rows: got ", max_logit_rows,
                ", wanted 1 to ", kMaxLogitRows);
  PARTITA_CHECK(max_tokens > 0, "max_tokens: got ", max_tokens, ", wanted at least 1");
  size_t num_bytes = 0;
  lay_out(gpu, nullptr, max_logit_rows, vocab_size, max_tokens, capacity, &num_bytes);
  return num_bytes;
}

void sample_gpu(Gpu& gpu, const SampleGpuParams& params, GpuStream stream) {
  check_rows(params.num_logit_rows, params.vocab_size, params.logits_stride);
  check_given(params.logits, "logits");
  check_given(params.logit_rows, "logit_rows");
  check_given(params.num_tokens, "num_tokens");
  check_given(params.tokens, "tokens");
  check_given(params.rows.records, "rows");
  check_given(params.sampled, "sampled");
  check_given(params.workspace.data, "workspace");
  PARTITA_CHECK(params.num_logit_rows <= params.workspace.max_logit_rows, "num_logit_rows: got ", params.num_logit_rows,
                ", wanted at most the workspace's ", params.workspace.max_logit_rows);
  PARTITA_CHECK(params.tokens_stride > 0, "tokens_stride: got ", params.tokens_stride, ", wanted at least 1");
  if (params.features.logprobs) {
    check_given(params.logprobs, "logprobs");
    check_given(params.ranks, "ranks");
    check_given(params.top_ids, "top_ids");
    check_given(params.top_logprobs, "top_logprobs");
  }
  if (params.num_logit_rows == 0) return;

  SamplingLaunch launch{};
  launch.call = params;
  launch.workspace = lay_out(gpu, params.workspace.data, params.workspace.max_logit_rows, params.vocab_size,
                             params.workspace.max_tokens, params.capacity, nullptr);
  launch.num_splits = num_splits_of(gpu, params.num_logit_rows, params.vocab_size);
  launch.segment_length =
      static_cast<int32_t>(round_up(params.vocab_size, launch.num_splits * kSamplingWarps * kSegmentUnit) /
                           (launch.num_splits * kSamplingWarps));
  if (params.features.adjusts) kernel_of<SamplingAdjustKernel>(gpu).launch(launch, stream);
  const SamplingScanKernel& scan = kernel_of<SamplingScanKernel>(gpu);
  scan.launch(launch, /*is_raw=*/false, stream);
  if (params.features.draws) kernel_of<SamplingWeighKernel>(gpu).launch(launch, stream);
  if (params.features.logprobs) {
    scan.launch(launch, /*is_raw=*/true, stream);
    kernel_of<SamplingLogprobsKernel>(gpu).launch(launch, stream);
  }
}

void score_gpu(Gpu& gpu, const ScoreGpuParams& params, GpuStream stream) {
  check_rows(params.num_logit_rows, params.vocab_size, params.logits_stride);
  check_given(params.logits, "logits");
  check_given(params.logit_rows, "logit_rows");
  check_given(params.num_tokens, "num_tokens");
  check_given(params.tokens, "tokens");
  check_given(params.scores, "scores");
  if (params.num_logit_rows > 0) kernel_of<ScoreKernel>(gpu).launch(params, stream);
}

void soft_cap_gpu(Gpu& gpu, const SoftCapGpuParams& params, GpuStream stream) {
  check_rows(params.num_logit_rows, params.vocab_size, params.logits_stride);
  check_given(params.logits, "logits");
  PARTITA_CHECK(params.cap > 0 && std::isfinite(params.cap), "soft_cap: got ", params.cap,
                ", wanted a positive number");
  if (params.num_logit_rows > 0) kernel_of<SoftCapKernel>(gpu).launch(params, stream);
}

}  // namespace partita
