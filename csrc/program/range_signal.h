// The end of a submitted range, for ranges of other lanes that wait for it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "core/gpu.h"
#include "program/futex.h"

namespace partita {

// kLaunched is a GPU's: all of the range lies in its stream, and an event behind it. Other streams can wait for that,
// so their ranges are launched while this one runs. kBroken: the range failed or was stopped.
class RangeSignal {
 public:
  enum class State : uint32_t { kPending, kLaunched, kEnded, kBroken };

  State state() const { return state_.load(std::memory_order_acquire); }
  bool has_ended() const { return state() >= State::kEnded; }

  void launch(GpuEvent event) { move_to(State::kLaunched, event); }
  // From here on the event may be destroyed.
  void end(bool is_whole) { move_to(is_whole ? State::kEnded : State::kBroken, nullptr); }

  // Waits until the range has ended or is launched. Spins for some 20 us, because operators of nano-batches follow each
  // other within that; then sleeps. Looks every millisecond whether it is still wanted; returns kPending when it is
  // not.
  template <typename IsWanted>
  State wait(IsWanted is_wanted) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (state() != State::kPending) return state();
      cpu_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (state() == State::kPending && is_wanted()) moved_.wait_for(lock, std::chrono::milliseconds(1));
    return state();
  }

  // What the stream gets next runs behind the launched range.
  void order_behind(Gpu& gpu, GpuStream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (event_) gpu.stream_wait(stream, event_);
  }

 private:
  void move_to(State state, GpuEvent event) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      event_ = event;
      state_.store(state, std::memory_order_release);
    }
    moved_.notify_all();
  }

  static constexpr int kSpins = 512;
  std::atomic<State> state_{State::kPending};
  std::mutex mutex_;
  std::condition_variable moved_;
  GpuEvent event_ = nullptr;
};

using RangeSignals = std::vector<std::shared_ptr<RangeSignal>>;

// Waits for all to end or be launched; returns whether none is broken. Those that are not wanted any more count as
// broken.
template <typename IsWanted>
bool wait_for_all(const RangeSignals& signals, IsWanted is_wanted) {
  for (const auto& signal : signals)
    if (const auto state = signal->wait(is_wanted);
        state == RangeSignal::State::kPending || state == RangeSignal::State::kBroken)
      return false;
  return true;
}

constexpr const char* kBrokenBefore = "a range before it failed or was stopped";

}  // namespace partita
