#include "program/completions.h"

#include <time.h>

#include <chrono>
#include <utility>

namespace partita {

int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void CompletionQueue::push(Completion completion) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    completions_.push_back(std::move(completion));
  }
  arrived_.notify_one();
}

void CompletionQueue::notify() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    was_notified_ = true;
  }
  arrived_.notify_one();
}

std::vector<Completion> CompletionQueue::wait_any(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_ready = [this] { return was_notified_ || !completions_.empty(); };
  if (timeout_s < 0)
    arrived_.wait(lock, is_ready);
  else
    arrived_.wait_for(lock, std::chrono::duration<double>(timeout_s), is_ready);
  was_notified_ = false;
  std::vector<Completion> taken;
  taken.swap(completions_);
  return taken;
}

}  // namespace partita
