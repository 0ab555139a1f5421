// The end of a submitted range, for ranges of other lanes that wait for it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "program/futex.h"

namespace partita {

class RangeSignal {
 public:
  enum class State : uint32_t { kPending, kEnded, kBroken };  // kBroken: it failed or was stopped

  State state() const { return state_.load(std::memory_order_acquire); }

  void end(bool is_whole) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_.store(is_whole ? State::kEnded : State::kBroken, std::memory_order_release);
    }
    ended_.notify_all();
  }

  // Spins for some 20 us, because operators of a nano-batch follow each other within that; then sleeps. Looks every
  // millisecond whether it is still wanted. Returns kPending when it is not.
  template <typename IsWanted>
  State wait(IsWanted is_wanted) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (state() != State::kPending) return state();
      cpu_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (state() == State::kPending && is_wanted()) ended_.wait_for(lock, std::chrono::milliseconds(1));
    return state();
  }

 private:
  static constexpr int kSpins = 512;
  std::atomic<State> state_{State::kPending};
  std::mutex mutex_;
  std::condition_variable ended_;
};

using RangeSignals = std::vector<std::shared_ptr<RangeSignal>>;

// Waits for all; returns whether all ended well. Those that are not wanted any more count as broken.
template <typename IsWanted>
bool wait_for_all(const RangeSignals& signals, IsWanted is_wanted) {
  for (const auto& signal : signals)
    if (signal->wait(is_wanted) != RangeSignal::State::kEnded) return false;
  return true;
}

constexpr const char* kBrokenBefore = "a range before it failed or was stopped";

}  // namespace partita
