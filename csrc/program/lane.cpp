#include "program/lane.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/check.h"
#include "core/chunk_claims.h"
#include "program/futex.h"

namespace partita {
namespace {

// Between stages the next one opens within microseconds, so a worker spins for about 20 us (a pause is some 40 ns);
// a sleep costs about 50 us to wake from. Between ranges the engine thread answers within some 100 us.
constexpr int kStageSpins = 512;
constexpr int kQueueSpins = 2048;

constexpr uint32_t kFinished = 0xffffffffu;

// A phase of a node, with the words its workers share, each in a cache line of its own.
struct alignas(64) Stage {
  const CpuOp* op = nullptr;
  int node = 0;
  int phase = 0;
  int64_t num_chunks = 0;
  bool begins_node = false;
  ChunkRun* runs = nullptr;  // [num_runs] of the execution
  int num_runs = 1;
  alignas(64) std::atomic<int64_t> num_done{0};
};

}  // namespace

class LaneExecution {
 public:
  LaneExecution(uint64_t ticket, std::shared_ptr<CpuFrame> frame, int first, int last, bool is_traced,
                RangeSignals after, std::shared_ptr<RangeSignal> signal)
      : ticket(ticket),
        frame(std::move(frame)),
        first(first),
        last(last),
        is_traced(is_traced),
        after(std::move(after)),
        signal(std::move(signal)) {}

  // Returns once all that the range comes after have ended; false: it does not begin, because one of them did not end
  // well or it was asked to stop. A worker that waits keeps its core: what it waits for runs on other cores, or did on
  // this lane.
  bool wait_for_turn() {
    const bool are_well = wait_for_all(after, [this] { return !stop_requested.load(std::memory_order_relaxed); });
    cursor = first;
    was_stopped = stop_requested.load();
    if (was_stopped) return false;
    if (!are_well)
      error = kBrokenBefore;
    else if (frame->cursor() != first)
      error = concat("the frame rests at node ", frame->cursor(), ", the range begins at ", first);
    has_begun = error.empty();
    return has_begun;
  }

  // Sizes come from the frame, whose step is complete by now; done by the first worker that arrives.
  void open(int num_workers) {
    const auto& nodes = frame->program().nodes();
    size_t num_stages = 0, num_runs = 0;
    for (int node = first; node < last; ++node)
      for (int phase = 0; phase < nodes[node].cpu_op->num_phases(); ++phase) {
        ++num_stages;
        num_runs += nodes[node].cpu_op->claims_in_runs(phase) ? num_workers : 1;
      }
    stages = std::vector<Stage>(num_stages);
    runs = std::vector<ChunkRun>(num_runs);
    ChunkRun* next_runs = runs.data();
    size_t stage_idx = 0;
    for (int node = first; node < last; ++node)
      for (int phase = 0; phase < nodes[node].cpu_op->num_phases(); ++phase) {
        Stage& stage = stages[stage_idx++];
        stage.op = nodes[node].cpu_op;
        stage.node = node;
        stage.phase = phase;
        stage.begins_node = phase == 0;
        stage.num_chunks = stage.op->num_chunks(*frame, phase);
        stage.num_runs = stage.op->claims_in_runs(phase) ? num_workers : 1;
        stage.runs = next_runs;
        next_runs += stage.num_runs;
        open_runs(stage.runs, stage.num_runs, stage.num_chunks);
      }
    start_ns = monotonic_ns();
    if (is_traced) spans.reserve(last - first);
  }

  // Opens the stage that follows `stage_idx` (-1: the first), skipping empty ones, or finishes the range.
  // Called by exactly one worker at a time. Returns true when the range is finished.
  bool advance(int stage_idx) {
    int next = stage_idx + 1;
    const int num_stages = static_cast<int>(stages.size());
    const int64_t now = is_traced ? monotonic_ns() : 0;
    if (is_traced && stage_idx >= 0) close_span(stage_idx, next, now);
    while (next < num_stages) {
      if (stages[next].begins_node && (stop_requested.load(std::memory_order_relaxed) || has_failed)) break;
      if (stages[next].num_chunks > 0) break;
      ++next;
    }
    if (has_failed) next = num_stages;
    const bool is_finished =
        next >= num_stages || (stages[next].begins_node && stop_requested.load(std::memory_order_relaxed));
    if (is_finished) {
      cursor = next >= num_stages ? last : stages[next].node;
      was_stopped = cursor < last;
      return true;
    }
    if (is_traced && (spans.empty() || spans.back().node != stages[next].node))
      spans.push_back({stages[next].node, now, now});
    publish(static_cast<uint32_t>(next));
    return false;
  }

  void publish(uint32_t stage_idx) {
    open_stage.store(stage_idx, std::memory_order_seq_cst);
    if (num_sleepers.load(std::memory_order_seq_cst) > 0) futex_wake_all(&open_stage);
  }

  void close_span(int stage_idx, int next, int64_t now) {
    const bool node_ends = next >= static_cast<int>(stages.size()) || stages[next].node != stages[stage_idx].node;
    if (!spans.empty() && node_ends) spans.back().end_ns = now;
  }

  const uint64_t ticket;
  const std::shared_ptr<CpuFrame> frame;
  const int first, last;
  const bool is_traced;
  const RangeSignals after;
  const std::shared_ptr<RangeSignal> signal;
  std::vector<Stage> stages;
  std::vector<ChunkRun> runs;
  std::once_flag opened;
  std::atomic<uint32_t> open_stage{kFinished - 1};  // index of the stage whose chunks may be claimed
  std::atomic<int> num_sleepers{0};
  std::atomic<bool> stop_requested{false};
  std::atomic<bool> has_failed{false};
  std::mutex error_mutex;
  std::string error;
  int64_t start_ns = 0;
  int cursor = 0;
  bool was_stopped = false;
  bool has_begun = false;
  std::vector<NodeSpan> spans;
};

Lane::Lane(int lane_idx, std::vector<int> cores, int num_workers, std::shared_ptr<CompletionQueue> completions)
    : lane_idx_(lane_idx), cores_(std::move(cores)), completions_(std::move(completions)) {
  if (!cores_.empty()) num_workers = static_cast<int>(cores_.size());
  PARTITA_CHECK(num_workers > 0, "num_workers: got ", num_workers, ", wanted a positive number");
  for (int core : cores_)
    PARTITA_CHECK(core >= 0 && core < CPU_SETSIZE, "cores: got ", core, ", wanted 0 to ", CPU_SETSIZE - 1);
  for (int worker_idx = 0; worker_idx < num_workers; ++worker_idx)
    workers_.emplace_back([this, worker_idx, num_workers] { work(worker_idx, num_workers); });
}

Lane::~Lane() {
  is_closing_.store(true);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& execution : executions_) execution->stop_requested.store(true);
  }
  submitted_word_.fetch_add(1);
  futex_wake_all(&submitted_word_);
  for (std::thread& worker : workers_) worker.join();
}

uint64_t Lane::submit(std::shared_ptr<CpuFrame> frame, int first, int last, RangeSignals after) {
  PARTITA_CHECK(frame != nullptr, "frame: got none");
  std::shared_ptr<RangeSignal> signal = claim_range(*frame, first, last, after);
  uint64_t ticket;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ticket = ++num_submitted_;
    executions_.push_back(std::make_shared<LaneExecution>(ticket, std::move(frame), first, last, is_tracing_.load(),
                                                          std::move(after), std::move(signal)));
  }
  submitted_word_.fetch_add(1, std::memory_order_seq_cst);
  if (num_sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(&submitted_word_);
  return ticket;
}

void Lane::request_stop(uint64_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& execution : executions_)
    if (execution->ticket == ticket) execution->stop_requested.store(true);
}

// The oldest execution with a ticket above `sequence`; null when there is none yet.
std::shared_ptr<LaneExecution> Lane::execution_after(uint64_t sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& execution : executions_)
    if (execution->ticket > sequence) return execution;
  return nullptr;
}

void Lane::work(int worker_idx, int num_workers) {
  if (!cores_.empty()) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    for (int core : cores_) CPU_SET(core, &mask);
    pthread_setaffinity_np(pthread_self(), sizeof mask, &mask);  // refused: the lane runs where the system puts it
  }
  pthread_setname_np(pthread_self(), concat("lane", lane_idx_, ".", worker_idx).substr(0, 15).c_str());

  Worker worker;
  worker.worker_idx = worker_idx;
  worker.num_workers = num_workers;
  uint64_t last_ticket = 0;
  for (;;) {
    // Wait for the next range.
    std::shared_ptr<LaneExecution> execution;
    for (;;) {
      const uint32_t word = submitted_word_.load(std::memory_order_seq_cst);
      execution = execution_after(last_ticket);
      if (execution) break;
      if (is_closing_.load()) return;
      int spins = 0;
      while (submitted_word_.load(std::memory_order_relaxed) == word && spins++ < kQueueSpins) cpu_pause();
      if (submitted_word_.load(std::memory_order_relaxed) != word) continue;
      num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
      futex_wait(&submitted_word_, word);
      num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    last_ticket = execution->ticket;

    const auto finish = [&] {
      Completion completion;
      completion.ticket = execution->ticket;
      completion.lane = lane_idx_;
      completion.first_node = execution->first;
      completion.cursor = execution->cursor;
      completion.was_stopped = execution->was_stopped;
      completion.error = execution->error;
      completion.start_ns = execution->start_ns;
      completion.end_ns = monotonic_ns();
      completion.spans = std::move(execution->spans);
      if (execution->has_begun) execution->frame->advance_cursor(execution->cursor);
      execution->frame->num_ranges.fetch_sub(1);
      // Reported before the next range can start, here or on another lane: so completions come in the order of the
      // work.
      completions_->push(std::move(completion));
      execution->signal->end(execution->error.empty() && !execution->was_stopped);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        executions_.erase(std::find(executions_.begin(), executions_.end(), execution));
      }
      execution->publish(kFinished);
    };

    std::call_once(execution->opened, [&] {
      if (!execution->wait_for_turn()) {
        execution->start_ns = monotonic_ns();
        finish();
        return;
      }
      execution->open(worker.num_workers);
      if (execution->advance(-1)) finish();
    });

    uint32_t stage_idx = execution->open_stage.load(std::memory_order_acquire);
    while (stage_idx != kFinished) {
      Stage& stage = execution->stages[stage_idx];
      for (ClaimedChunk claimed; claim_chunk(stage.runs, stage.num_runs, worker_idx, &claimed);) {
        worker.run_end = claimed.run_end;
        try {
          if (!execution->has_failed.load(std::memory_order_relaxed))
            stage.op->run_chunk(*execution->frame, stage.phase, claimed.chunk, worker, &stage);
        } catch (const std::exception& error) {
          const std::lock_guard<std::mutex> lock(execution->error_mutex);
          if (execution->error.empty())
            execution->error = concat(execution->frame->program().nodes()[stage.node].name, ": ", error.what());
          execution->has_failed.store(true);
        }
        if (stage.num_done.fetch_add(1, std::memory_order_acq_rel) + 1 == stage.num_chunks)
          if (execution->advance(static_cast<int>(stage_idx))) finish();
      }
      int spins = 0;
      uint32_t current;
      while ((current = execution->open_stage.load(std::memory_order_acquire)) == stage_idx) {
        if (spins++ < kStageSpins) {
          cpu_pause();
          continue;
        }
        execution->num_sleepers.fetch_add(1, std::memory_order_seq_cst);
        futex_wait(&execution->open_stage, stage_idx);
        execution->num_sleepers.fetch_sub(1, std::memory_order_seq_cst);
      }
      stage_idx = current;
    }
    worker.private_rows_owner = nullptr;
  }
}

}  // namespace partita
