// What came of submitted ranges, and where the engine thread waits for it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace partita {

// When one node of a range ran.
struct NodeSpan {
  int node = 0;
  int64_t start_ns = 0;  // CLOCK_MONOTONIC
  int64_t end_ns = 0;
};

// A finished range.
struct Completion {
  uint64_t ticket = 0;
  int lane = 0;
  int first_node = 0;
  int cursor = 0;            // the node after the last one that ran
  bool was_stopped = false;  // by request_stop, before the range's end
  std::string error;         // empty: ran well
  int64_t start_ns = 0;
  int64_t end_ns = 0;
  std::vector<NodeSpan> spans;  // with tracing on
};

// Where lanes report and the engine thread waits; shared by all lanes of an engine.
class CompletionQueue {
 public:
  void push(Completion completion);
  // Makes a wait return early, with whatever is there (also when nothing is).
  void notify();
  // Sleeps until a completion or a notify() arrives or the time is over; takes all completions there are.
  std::vector<Completion> wait_any(double timeout_s);

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<Completion> completions_;
  bool was_notified_ = false;
};

int64_t monotonic_ns();  // CLOCK_MONOTONIC

}  // namespace partita
