#include "program/frame.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace partita {

Frame::Frame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena, std::shared_ptr<RowStore> rows,
             int64_t max_tokens, int64_t max_logit_rows)
    : program_(std::move(program)),
      arena_(std::move(arena)),
      row_store_(std::move(rows)),
      max_tokens_(max_tokens),
      max_logit_rows_(max_logit_rows) {
  PARTITA_CHECK(program_ && program_->is_sealed(), "program: got one that is not sealed");
  PARTITA_CHECK(max_tokens > 0, "max_tokens: got ", max_tokens, ", wanted a positive number");
  PARTITA_CHECK(max_logit_rows > 0, "max_logit_rows: got ", max_logit_rows, ", wanted a positive number");
  for (const ProgramAttention& plan : program_->attention_plans())
    PARTITA_CHECK(plan.group >= 0 && plan.group < static_cast<int>(arena_->groups().size()),
                  "program: attends in KV group ", plan.group, ", the arena has ", arena_->groups().size());
  PARTITA_CHECK(arena_->gpu() == program_->gpu(), "arena: lies on another device than the program");
  PARTITA_CHECK(row_store_->gpu() == program_->gpu(), "rows: lie on another device than the program");
}

void Frame::clear_step() {
  shape_ = StepShape{};
  step_rows_.clear();
  copies_.clear();
  input_embeddings_.clear();
  token_rows_.clear();
  token_positions_.clear();
  logit_tokens_.clear();
  cu_seqlens_q_.clear();
  context_starts_.clear();
}

void Frame::prepare(const std::vector<StepRow>& step_rows, const std::vector<PageCopyPair>& copies, bool score_all) {
  PARTITA_CHECK(num_ranges.load() == 0, "frame: prepare() while a submitted range is not finished");
  clear_step();
  score_all_ = score_all;
  const int page_size = arena_->page_size();
  const int num_groups = static_cast<int>(arena_->groups().size());
  cu_seqlens_q_.push_back(0);
  for (size_t i = 0; i < step_rows.size(); ++i) {
    const StepRow& step_row = step_rows[i];
    auto fail = [&](auto&&... parts) {
      clear_step();
      throw_value_error("rows[", i, "]: ", parts...);
    };
    if (step_row.row < 0 || step_row.row >= row_store_->num_rows())
      fail("got row ", step_row.row, ", wanted 0 to ", row_store_->num_rows() - 1);
    const int64_t end = static_cast<int64_t>(step_row.start) + step_row.num_tokens;
    if (step_row.start < 0 || step_row.num_tokens <= 0 || end > row_store_->max_tokens())
      fail("got tokens ", step_row.start, " to ", end, ", wanted a range within 0 to ", row_store_->max_tokens());
    for (int group = 0; group < num_groups; ++group)
      if (end > row_store_->num_pages(step_row.row, group) * page_size)
        fail("tokens up to ", end, " are scheduled, its ", row_store_->num_pages(step_row.row, group),
             " pages of KV group ", group, " hold fewer");
    for (int32_t t = 0; t < step_row.num_tokens; ++t) {
      token_rows_.push_back(step_row.row);
      token_positions_.push_back(step_row.start + t);
    }
    const int32_t num_tokens = static_cast<int32_t>(token_rows_.size());
    if (score_all)
      for (int32_t t = num_tokens - step_row.num_tokens; t < num_tokens; ++t) logit_tokens_.push_back(t);
    else if (step_row.samples)
      logit_tokens_.push_back(num_tokens - 1);
    cu_seqlens_q_.push_back(num_tokens);
    context_starts_.push_back(step_row.start);
  }
  const int64_t num_tokens = static_cast<int64_t>(token_rows_.size());
  const int64_t num_logit_rows = static_cast<int64_t>(logit_tokens_.size());
  if (num_tokens == 0 || num_tokens > max_tokens_ || num_logit_rows > max_logit_rows_) {
    clear_step();
    throw_value_error("rows: got ", num_tokens, " tokens and ", num_logit_rows, " logit rows, wanted 1 to ",
                      max_tokens_, " and at most ", max_logit_rows_);
  }
  step_rows_ = step_rows;
  copies_ = copies;
  shape_.num_tokens = num_tokens;
  shape_.num_requests = static_cast<int64_t>(step_rows.size());
  shape_.num_logit_rows = num_logit_rows;
  sampled_.resize(std::max<size_t>(sampled_.size(), num_logit_rows));
  scores_.resize(std::max<size_t>(scores_.size(), num_logit_rows));

  build_step();
  cursor_.store(0, std::memory_order_release);
  last_claimed.reset();
}

void Frame::set_input_embeddings(const float* embeddings, int64_t num_tokens, int64_t hidden_size) {
  PARTITA_CHECK(num_tokens == shape_.num_tokens, "input_embeddings: got ", num_tokens, " rows, wanted ",
                shape_.num_tokens, " (the step's tokens)");
  input_embeddings_.assign(embeddings, embeddings + num_tokens * hidden_size);
}

std::shared_ptr<RangeSignal> claim_range(Frame& frame, int first, int last, const RangeSignals& after) {
  const int num_nodes = frame.program().num_nodes();
  PARTITA_CHECK(first >= 0 && first < last && last <= num_nodes, "nodes: got ", first, " to ", last,
                ", wanted a non-empty range within 0 to ", num_nodes);
  PARTITA_CHECK(frame.num_tokens() > 0, "frame: submitted before prepare()");
  for (const auto& signal : after) PARTITA_CHECK(signal != nullptr, "after: got none for a range, wanted its signal");
  const bool is_chained = std::find(after.begin(), after.end(), frame.last_claimed) != after.end();
  if (frame.num_ranges.load() > 0) {
    PARTITA_CHECK(is_chained, "frame: submitted while an earlier range of it is not finished, and not after it");
    PARTITA_CHECK(first == frame.claimed_end, "first: got node ", first,
                  ", wanted the end of the range before it, node ", frame.claimed_end);
  } else if (!is_chained) {  // what it comes after may have ended, well or not: then the lane sees where the frame
                             // rests
    PARTITA_CHECK(first == frame.cursor(), "first: got node ", first, ", wanted the frame's cursor, node ",
                  frame.cursor());
  }
  frame.num_ranges.fetch_add(1);
  frame.claimed_end = last;
  frame.last_claimed = std::make_shared<RangeSignal>();
  return frame.last_claimed;
}

}  // namespace partita
