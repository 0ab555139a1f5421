#include "program/gpu_frame.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/float16.h"

namespace partita {
namespace {

// A shared pass costs a partial result and a merge for every row: some hundred tokens' worth of reading.
constexpr int64_t kMinSharedTokens = 512;

}  // namespace

GpuStepLimits GpuFrame::step_limits(const Program& program, int num_rows, int64_t max_context, int num_groups,
                                    int page_size, int64_t max_tokens, int64_t max_logit_rows) {
  GpuStepLimits limits;
  limits.max_tokens = max_tokens;
  limits.max_logit_rows = max_logit_rows;
  limits.max_requests = std::min<int64_t>(num_rows, max_tokens);
  limits.max_context = max_context;
  limits.page_size = page_size;
  limits.num_groups = num_groups;
  limits.is_batch_invariant = program.is_batch_invariant();
  return limits;
}

GpuFrame::GpuFrame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena,
                   std::shared_ptr<RowStore> rows, int64_t max_tokens, int64_t max_logit_rows)
    : Frame(std::move(program), std::move(arena), std::move(rows), max_tokens, max_logit_rows), gpu_(program_->gpu()) {
  PARTITA_CHECK(gpu_ != nullptr, "program: got the CPU's, wanted a GPU's");
  limits_ = step_limits(*program_, row_store_->num_rows(), row_store_->max_tokens(),
                        static_cast<int>(arena_->groups().size()), arena_->page_size(), max_tokens_, max_logit_rows_);
  own_memory_ = std::make_shared<GpuFrameMemory>(*program_, limits_);
  staging_ = GpuPinnedBuffer(gpu_, own_memory_->input_bytes());
  results_ = GpuPinnedBuffer(gpu_, static_cast<size_t>(GpuResultLayout(max_logit_rows_).num_bytes));
  plans_ = make_attention_plans(*program_);
}

void GpuFrame::build_step() {
  has_results_ = false;
  PARTITA_CHECK(num_requests() <= limits_.max_requests, "rows: got ", num_requests(), " of them, wanted at most ",
                limits_.max_requests);
  PARTITA_CHECK(static_cast<int64_t>(copies().size()) <= limits_.max_copies(), "copies: got ", copies().size(),
                " of them, wanted at most ", limits_.max_copies());
  features_ = {false, false, false};
  wants_top_ = false;
  for (const StepRow& step_row : step_rows()) {
    if (!step_row.samples) continue;
    const SamplingParams& sampling = row_store_->sampling(step_row.row);
    features_ = features_ | GpuSamplingFeatures::of(sampling);
    wants_top_ |= sampling.num_logprobs > 0;
  }
  find_shared_prefixes();
  for (const ProgramAttention& plan : program_->attention_plans()) {
    double pairs = 0;
    const int64_t window = plan.layout.window > 0 ? plan.layout.window : row_store_->max_tokens();
    for (int64_t t = 0; t < num_tokens(); ++t)
      pairs += static_cast<double>(std::min<int64_t>(token_positions()[t] + 1, window));
    shape_.score_pairs = std::max(shape_.score_pairs, pairs);
  }
}

// Runs of neighbouring requests of which each begins with at least kMinSharedTokens of the first one's pages. Not where
// a token's result must not depend on its neighbours, nor in groups with a window, whose pages go out of sight.
void GpuFrame::find_shared_prefixes() {
  shared_prefixes_.assign(limits_.num_groups, {});
  shared_prefix_bytes_ = 0;
  num_shared_prefixes_ = 0;
  if (program_->is_batch_invariant() || num_requests() < 2) return;
  const int page_size = limits_.page_size, num_rows = static_cast<int>(num_requests());
  const int64_t least = (kMinSharedTokens + page_size - 1) / page_size;
  for (int group = 0; group < limits_.num_groups; ++group) {
    if (arena_->groups()[group].window > 0) continue;
    const auto table = [&](int r) { return row_store_->page_table(step_rows()[r].row, group); };
    for (int first = 0; first + 1 < num_rows;) {
      int64_t shared = step_rows()[first].start / page_size;  // pages before its first query
      int end = first + 1;
      for (; end < num_rows && shared >= least; ++end) {
        const int64_t most = std::min<int64_t>(shared, step_rows()[end].start / page_size);
        int64_t common = 0;
        while (common < most && table(first)[common] == table(end)[common]) ++common;
        if (common < least) break;
        shared = common;
      }
      if (end - first >= 2) {
        shared_prefixes_[group].push_back({first, end - first, shared * page_size});
        shared_prefix_bytes_ += static_cast<double>((end - first - 1) * shared) * arena_->groups()[group].page_bytes();
        ++num_shared_prefixes_;
      }
      first = end;
    }
  }
}

bool GpuFrame::is_plain_decode() const {
  if (scores_all() || input_embeddings() || !copies().empty()) return false;
  return std::all_of(step_rows().begin(), step_rows().end(),
                     [](const StepRow& step_row) { return step_row.num_tokens == 1 && step_row.samples; });
}

GpuPlanOptions GpuFrame::plan_options(int num_ctas, int graph_rows) const {
  GpuPlanOptions options;
  options.num_ctas = num_ctas;
  options.is_batch_invariant = program_->is_batch_invariant();
  options.graph_rows = graph_rows;
  options.max_context = row_store_->max_tokens();
  return options;
}

GpuRun GpuFrame::stage(std::shared_ptr<GpuFrameMemory> memory, int graph_rows, GpuStream stream, int num_ctas) {
  memory_ = memory ? std::move(memory) : own_memory_;
  const bool is_graph = graph_rows > 0;
  const int num_groups = limits_.num_groups, page_size = limits_.page_size;

  // Plans first: the layout follows from how long their tables are. Padding is requests of one token, at no place.
  // So is a whole step for which nothing was prepared.
  std::vector<int32_t> cu_seqlens(1, 0);
  if (num_requests() > 0) cu_seqlens.assign(cu_seqlens_q(), cu_seqlens_q() + num_requests() + 1);
  std::vector<int32_t> starts(context_starts(), context_starts() + num_requests());
  for (int64_t r = num_requests(); r < graph_rows; ++r) {
    cu_seqlens.push_back(cu_seqlens.back() + 1);
    starts.push_back(-1);
  }
  GpuStepSizes sizes;
  sizes.num_tokens = is_graph ? graph_rows : num_tokens();
  sizes.num_requests = is_graph ? graph_rows : num_requests();
  sizes.num_logit_rows = is_graph ? graph_rows : num_logit_rows();
  sizes.num_copies = static_cast<int64_t>(copies().size());
  sizes.num_groups = num_groups;
  for (const StepRow& step_row : step_rows())
    sizes.page_table_stride =
        std::max<int64_t>(sizes.page_table_stride, (step_row.start + step_row.num_tokens - 1) / page_size + 1);
  if (is_graph) sizes.page_table_stride = limits_.max_pages();
  for (size_t i = 0; i < plans_.size(); ++i) {
    GpuAttentionPlan& plan = plans_[i];
    GpuPlanOptions options = plan_options(num_ctas, graph_rows);
    if (!is_graph && num_shared_prefixes_ > 0)
      options.shared_prefixes = shared_prefixes_[program_->attention_plans()[i].group];
    plan.build(static_cast<int>(sizes.num_requests), cu_seqlens.data(), starts.data(), options);
    sizes.plan_entries.push_back(static_cast<int64_t>(plan.tables().size()));
  }
  layout_ = std::make_unique<GpuStepLayout>(sizes);
  const GpuStepLayout& layout = *layout_;
  if (layout.num_bytes > static_cast<int64_t>(memory_->input_bytes()))
    throw std::runtime_error(
        concat("step inputs: ", layout.num_bytes, " bytes, there is room for ", memory_->input_bytes()));
  // A graph's tables may be longer than those of any step of this frame's own.
  if (staging_.bytes() < memory_->input_bytes()) staging_ = GpuPinnedBuffer(gpu_, memory_->input_bytes());
  if (results_.bytes() < static_cast<size_t>(memory_->result_layout().num_bytes))
    results_ = GpuPinnedBuffer(gpu_, static_cast<size_t>(memory_->result_layout().num_bytes));

  const auto at = [&](int64_t offset) { return GpuStepLayout::at(staging_.data(), offset); };
  const auto put = [&](int64_t offset, const int32_t* values, int64_t count, int64_t padded, int32_t padding) {
    std::copy_n(values, count, at(offset));
    std::fill(at(offset) + count, at(offset) + padded, padding);
  };
  put(layout.token_rows, token_rows(), num_tokens(), sizes.num_tokens, -1);
  put(layout.token_positions, token_positions(), num_tokens(), sizes.num_tokens, -1);
  put(layout.cu_seqlens_q, cu_seqlens.data(), sizes.num_requests + 1, sizes.num_requests + 1, 0);
  put(layout.context_starts, starts.data(), sizes.num_requests, sizes.num_requests, -1);
  put(layout.logit_tokens, logit_tokens(), num_logit_rows(), sizes.num_logit_rows, -1);
  int32_t* token_requests = at(layout.token_requests);
  for (int64_t r = 0; r < sizes.num_requests; ++r)
    std::fill(token_requests + cu_seqlens[r], token_requests + cu_seqlens[r + 1], static_cast<int32_t>(r));
  int32_t* logit_row = at(layout.logit_rows);
  int32_t* logit_num_tokens = at(layout.logit_num_tokens);
  for (int64_t s = 0; s < sizes.num_logit_rows; ++s) {
    const bool is_padding = s >= num_logit_rows();
    logit_row[s] = is_padding ? -1 : token_rows()[logit_tokens()[s]];
    logit_num_tokens[s] = is_padding ? 0 : token_positions()[logit_tokens()[s]] + 1;
  }
  *at(layout.num_copies) = static_cast<int32_t>(sizes.num_copies);
  int32_t* pair = at(layout.copies);
  for (const PageCopyPair& copy : copies()) {
    *pair++ = copy.source;
    *pair++ = copy.target;
  }
  for (int group = 0; group < num_groups; ++group)
    for (int64_t r = 0; r < sizes.num_requests; ++r) {
      int32_t* table = at(layout.page_tables[group]) + r * sizes.page_table_stride;
      int64_t used = 0;
      if (r < num_requests()) {
        const StepRow& step_row = step_rows()[r];
        used = (step_row.start + step_row.num_tokens - 1) / page_size + 1;
        std::copy_n(row_store_->page_table(step_row.row, group), used, table);
      }
      std::fill(table + used, table + sizes.page_table_stride, 0);  // never read: a page that exists all the same
    }
  for (size_t plan = 0; plan < plans_.size(); ++plan)
    std::copy(plans_[plan].tables().begin(), plans_[plan].tables().end(), at(layout.plan_tables[plan]));

  run_ = GpuRun{};
  run_.gpu = gpu_.get();
  run_.stream = stream;
  run_.num_ctas = num_ctas;
  run_.num_tokens = sizes.num_tokens;
  run_.num_logit_rows = sizes.num_logit_rows;
  run_.num_requests = static_cast<int>(sizes.num_requests);
  run_.num_copies = sizes.num_copies;
  run_.scores_all = scores_all();
  run_.has_input_embeddings = input_embeddings() != nullptr;
  run_.features = features_;
  run_.memory = memory_.get();
  run_.layout = layout_.get();
  run_.page_table_stride = sizes.page_table_stride;
  run_.arena = arena_.get();
  run_.rows = row_store_.get();
  run_.plans = &plans_;
  return run_;
}

GpuRun GpuFrame::resume(GpuStream stream, int num_ctas) const {
  GpuRun run = run_;
  run.stream = stream;
  run.num_ctas = num_ctas;
  return run;
}

void GpuFrame::upload(const GpuRun& run) {
  for (const StepRow& step_row : step_rows()) row_store_->upload_if_admitted(step_row.row, run.stream);
  gpu_->copy(memory_->inputs(), staging_.data(), static_cast<size_t>(layout_->num_bytes), GpuCopy::kHostToDevice,
             run.stream);
  if (!input_embeddings()) return;
  for (const Node& node : program_->nodes())
    if (std::strcmp(node.op->kind(), "embedding") == 0) {
      const BufferSpec& spec = program_->buffers()[node.writes[0]];
      gpu_->copy(memory_->buffer(node.writes[0]), input_embeddings(),
                 static_cast<size_t>(num_tokens() * spec.row_bytes()), GpuCopy::kHostToDevice, run.stream);
    }
}

void GpuFrame::download_results(const GpuRun& run) {
  if (num_logit_rows() == 0) return;
  const GpuResultLayout& layout = memory_->result_layout();
  // The blocks of different memories differ in their sections' places; each is copied as it lies there.
  const int64_t bytes = wants_top_ && !scores_all() ? layout.num_bytes : layout.bytes_without_top;
  gpu_->copy(results_.data(), memory_->results(), static_cast<size_t>(bytes), GpuCopy::kDeviceToHost, run.stream);
  has_results_ = true;
}

void GpuFrame::take_results() {
  if (!has_results_) return;
  has_results_ = false;
  const GpuResultLayout& layout = memory_->result_layout();
  const std::byte* block = results_.data();
  const auto* tokens = reinterpret_cast<const int32_t*>(block + layout.tokens);
  const auto* ranks = reinterpret_cast<const int32_t*>(block + layout.ranks);
  const auto* logprobs = reinterpret_cast<const float*>(block + layout.logprobs);
  for (int64_t s = 0; s < num_logit_rows(); ++s) {
    if (scores_all()) {
      score(s) = logprobs[s];
      continue;
    }
    const int32_t token_idx = logit_tokens()[s], row = token_rows()[token_idx];
    SampledToken& result = sampled(s);
    result = SampledToken{};
    result.token = tokens[s];
    const int32_t num_logprobs = row_store_->sampling(row).num_logprobs;
    if (num_logprobs >= 0 && result.token >= 0) {
      result.logprob = logprobs[s];
      result.rank = ranks[s];
      const auto* ids = reinterpret_cast<const int32_t*>(block + layout.top_ids) + s * kMaxTopLogprobs;
      const auto* values = reinterpret_cast<const float*>(block + layout.top_logprobs) + s * kMaxTopLogprobs;
      for (int32_t i = 0; i < num_logprobs; ++i) result.top.push_back({ids[i], values[i]});
    }
    row_store_->tokens(row)[token_positions()[token_idx] + 1] = result.token;
  }
}

void GpuFrame::read_buffer(BufferId id, float* out) const {
  const BufferSpec& spec = program_->buffers()[id];
  PARTITA_CHECK(spec.dtype == DType::kF32 || spec.dtype == DType::kF16 || spec.dtype == DType::kBF16, "name: got '",
                spec.name, "', which holds ", dtype_name(spec.dtype), ", wanted a buffer of floats");
  PARTITA_CHECK(memory_ != nullptr, "frame: read before anything ran in it");
  const int64_t count = num_rows(spec.rows) * spec.width;
  std::vector<std::byte> bytes(static_cast<size_t>(num_rows(spec.rows) * spec.row_bytes()));
  gpu_->copy(bytes.data(), memory_->buffer(id), bytes.size(), GpuCopy::kDeviceToHost, gpu_->default_stream());
  gpu_->synchronize(gpu_->default_stream());
  if (spec.dtype == DType::kF32) {
    std::memcpy(out, bytes.data(), bytes.size());
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + 2 * i, sizeof bits);
    out[i] = spec.dtype == DType::kF16 ? fp16_to_float(bits) : bf16_to_float(bits);
  }
}

}  // namespace partita
