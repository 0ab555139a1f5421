// One run of a program: its inputs, its results, and where it stands. What it computes in lies in a CpuFrame or a
// GpuFrame.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "program/kv_arena.h"
#include "program/program.h"
#include "program/range_signal.h"
#include "program/row_store.h"

namespace partita {

// One request's share of a step: tokens [start, start + num_tokens) of its row.
struct StepRow {
  int32_t row = 0;
  int32_t start = 0;
  int32_t num_tokens = 0;
  bool samples = false;  // a token follows the last scheduled one
};

struct PageCopyPair {
  int32_t source = 0;
  int32_t target = 0;
};

class Frame {
 public:
  virtual ~Frame() = default;
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

  // Sets the step's inputs and puts the cursor at the first node. Logits are computed for the last scheduled token of
  // each sampling row, or, with score_all, for every scheduled token but no sampling.
  // Throws ValueError on bad rows or sizes; then the frame holds no step. Must not be called while a range runs.
  void prepare(const std::vector<StepRow>& step_rows, const std::vector<PageCopyPair>& copies, bool score_all);
  // Replaces the embedding lookup of this step.  [T, H] fp32, copied.
  void set_input_embeddings(const float* embeddings, int64_t num_tokens, int64_t hidden_size);
  // A buffer's rows of this step as fp32.  out: [T or S, width]
  virtual void read_buffer(BufferId id, float* out) const = 0;

  const Program& program() const { return *program_; }
  const std::shared_ptr<const Program>& shared_program() const { return program_; }
  const KvArena& arena() const { return *arena_; }
  RowStore& row_store() const { return *row_store_; }
  const StepShape& shape() const { return shape_; }
  int64_t max_tokens() const { return max_tokens_; }
  int64_t max_logit_rows() const { return max_logit_rows_; }

  int64_t num_tokens() const { return shape_.num_tokens; }
  int64_t num_requests() const { return shape_.num_requests; }
  int64_t num_logit_rows() const { return shape_.num_logit_rows; }
  int64_t num_rows(RowKind rows) const { return rows == RowKind::kToken ? num_tokens() : num_logit_rows(); }
  const std::vector<StepRow>& step_rows() const { return step_rows_; }
  const std::vector<PageCopyPair>& copies() const { return copies_; }
  bool scores_all() const { return score_all_; }
  const float* input_embeddings() const { return input_embeddings_.empty() ? nullptr : input_embeddings_.data(); }

  const int32_t* token_rows() const { return token_rows_.data(); }            // [T] row of each token
  const int32_t* token_positions() const { return token_positions_.data(); }  // [T]
  const int32_t* logit_tokens() const { return logit_tokens_.data(); }        // [S] token row of each logit row
  const int32_t* cu_seqlens_q() const { return cu_seqlens_q_.data(); }        // [R + 1]
  const int32_t* context_starts() const { return context_starts_.data(); }    // [R]

  // Results of the sampling nodes.
  SampledToken& sampled(int64_t logit_row) { return sampled_[logit_row]; }
  const std::vector<SampledToken>& sampled() const { return sampled_; }
  float& score(int64_t logit_row) { return scores_[logit_row]; }
  const std::vector<float>& scores() const { return scores_; }

  int cursor() const { return cursor_.load(std::memory_order_acquire); }  // next node to run
  // A range has run up to this node. On a GPU two lanes may report neighbouring ranges in either order.
  void advance_cursor(int node) {
    for (int seen = cursor(); seen < node && !cursor_.compare_exchange_weak(seen, node);) {
    }
  }
  // Ranges that are running or queued; prepare() is refused meanwhile.
  std::atomic<int> num_ranges{0};
  // The submitting thread's: where the next range must begin, and the end of the last one queued (null: none was).
  int claimed_end = 0;
  std::shared_ptr<RangeSignal> last_claimed;

 protected:
  Frame(std::shared_ptr<const Program> program, std::shared_ptr<KvArena> arena, std::shared_ptr<RowStore> rows,
        int64_t max_tokens, int64_t max_logit_rows);
  // What the device needs of a step that is known to be good: plans, staged inputs. Sets shape_.score_pairs.
  virtual void build_step() = 0;

  std::shared_ptr<const Program> program_;
  std::shared_ptr<KvArena> arena_;
  std::shared_ptr<RowStore> row_store_;
  int64_t max_tokens_;
  int64_t max_logit_rows_;
  StepShape shape_;

 private:
  void clear_step();

  bool score_all_ = false;
  std::vector<StepRow> step_rows_;
  std::vector<PageCopyPair> copies_;
  std::vector<float> input_embeddings_;
  std::vector<int32_t> token_rows_, token_positions_, logit_tokens_;
  std::vector<int32_t> cu_seqlens_q_, context_starts_;  // [R + 1], [R]
  std::vector<SampledToken> sampled_;                   // [S]
  std::vector<float> scores_;                           // [S]
  std::atomic<int> cursor_{0};
};

// A range is about to be queued: throws ValueError when it is empty or does not begin where the frame rests, or the
// frame is unprepared. While earlier ranges of the frame are queued or running it must begin where the last of them
// ends and come after it: `after` names that one's end. Counts the range; returns its signal.
std::shared_ptr<RangeSignal> claim_range(Frame& frame, int first, int last, const RangeSignals& after);

}  // namespace partita
