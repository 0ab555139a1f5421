// A lane: an ordered queue of work on one partition of the chip; here a set of cores with its own workers.
//
// Workers claim chunks from an atomic counter, so no core waits for another's fixed half, and a core that the
// system takes away delays only the chunk it holds. Between the stages of a range there is no barrier of workers:
// whoever completes a stage's last chunk opens the next stage. Waiting workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "program/completions.h"
#include "program/cpu_frame.h"

namespace partita {

class LaneExecution;  // one submitted range, lane.cpp

class Lane {
 public:
  // cores: CPU numbers its workers may run on, one worker each. Empty: num_workers workers, wherever the system likes.
  Lane(int lane_idx, std::vector<int> cores, int num_workers, std::shared_ptr<CompletionQueue> completions);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  int lane_idx() const { return lane_idx_; }
  int num_workers() const { return static_cast<int>(workers_.size()); }
  const std::vector<int>& cores() const { return cores_; }

  // Queues nodes [first, last) of the frame's program behind what the lane already has; returns its ticket at once.
  // The range must start where the frame rests, or where the last queued range of the frame ends. It starts when all
  // that it comes `after` have ended, which lie on other lanes or earlier on this one; when one of those fails or is
  // stopped it fails too. Throws ValueError for another start, a frame without a step, or a frame with a queued range
  // that it does not come after.
  uint64_t submit(std::shared_ptr<CpuFrame> frame, int first, int last, RangeSignals after = {});
  // Asks a queued or running range to stop before its next node; nothing happens if it has finished.
  void request_stop(uint64_t ticket);
  void set_tracing(bool on) { is_tracing_.store(on); }

 private:
  void work(int worker_idx, int num_workers);
  std::shared_ptr<LaneExecution> execution_after(uint64_t sequence);

  int lane_idx_;
  std::vector<int> cores_;
  std::shared_ptr<CompletionQueue> completions_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<LaneExecution>> executions_;  // not yet finished, and finished ones workers may still see
  uint64_t num_submitted_ = 0;
  std::atomic<uint32_t> submitted_word_{0};  // low bits of num_submitted_; workers sleep on it
  std::atomic<int> num_sleepers_{0};
  std::atomic<bool> is_tracing_{false};
  std::atomic<bool> is_closing_{false};
  std::vector<std::thread> workers_;
};

}  // namespace partita
