#include "core/machine_peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "core/cpu/peak_loops.h"
#include "core/cpu_features.h"
#include "core/parallel_for.h"

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kWindowSeconds = 0.004;
constexpr size_t kReadBytesPerThread = size_t{64} << 20;

const PeakLoops& active_loops() {
#if defined(__x86_64__)
  if (active_cpu_isa() == CpuIsa::kAvx512) return kPeakLoopsAvx512;
  if (active_cpu_isa() == CpuIsa::kAvx2) return kPeakLoopsAvx2;
#endif
  return kPeakLoopsPortable;
}

// The best rate (units per second, all threads together) of windows in which every thread works.
// step(worker_idx) does a little work and returns its units.
double best_rate(int num_threads, double seconds, const std::function<double(int)>& step) {
  const int num_windows = std::max(1, static_cast<int>(seconds / kWindowSeconds));
  // [window][worker] units per second; a window's rate is the sum over workers.
  std::vector<double> rates(static_cast<size_t>(num_windows) * num_threads);
  std::atomic<int> ready{0};
  Clock::time_point start;
  std::atomic<bool> is_started{false};
  auto work = [&](int worker_idx) {
    step(worker_idx);
    if (ready.fetch_add(1) + 1 == num_threads) {
      start = Clock::now();
      is_started.store(true, std::memory_order_release);
    }
    while (!is_started.load(std::memory_order_acquire)) std::this_thread::yield();
    for (int window = 0; window < num_windows; ++window) {
      const auto end = start + std::chrono::duration<double>(kWindowSeconds * (window + 1));
      const auto begin = Clock::now();
      // A thread that comes late would have run while others waited: that is no rate of all together.
      if (end - begin < std::chrono::duration<double>(0.9 * kWindowSeconds)) continue;
      double units = 0;
      Clock::time_point now;
      do {
        units += step(worker_idx);
        now = Clock::now();
      } while (now < end);
      rates[static_cast<size_t>(window) * num_threads + worker_idx] =
          units / std::chrono::duration<double>(now - begin).count();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  double best = 0;  // over whole windows; on a machine so loaded that there is none, over what there is
  for (const bool only_whole : {true, false}) {
    for (int window = 0; window < num_windows; ++window) {
      const double* first = rates.data() + static_cast<size_t>(window) * num_threads;
      if (only_whole && std::find(first, first + num_threads, 0.0) != first + num_threads) continue;
      best = std::max(best, std::accumulate(first, first + num_threads, 0.0));
    }
    if (best > 0) break;
  }
  return best;
}

double read_rate(const PeakLoops& loops, int num_threads, double seconds) {
  std::vector<AlignedBuffer> buffers;
  for (int i = 0; i < num_threads; ++i) buffers.emplace_back(kReadBytesPerThread);
  parallel_for(num_threads, num_threads, [&](int64_t i, int) {
    std::memset(buffers[i].data(), 1, kReadBytesPerThread);
    loops.read(buffers[i].data(), kReadBytesPerThread);  // so that no write-back is timed
  });
  constexpr size_t kStepBytes = size_t{1} << 20;
  std::vector<size_t> offsets(static_cast<size_t>(num_threads) * 8, 0);  // 8: one cache line per worker
  return best_rate(num_threads, seconds, [&](int worker_idx) {
    size_t& offset = offsets[static_cast<size_t>(worker_idx) * 8];
    const double bytes = loops.read(buffers[worker_idx].data() + offset, kStepBytes);
    offset = (offset + kStepBytes) % kReadBytesPerThread;
    return bytes;
  });
}

}  // namespace

MachinePeaks measure_machine_peaks(int num_threads, double seconds) {
  PARTITA_CHECK(seconds > 0 && seconds <= 60, "seconds: got ", seconds, ", wanted a number in (0, 60]");
  if (num_threads <= 0) num_threads = usable_cores();
  const PeakLoops& loops = active_loops();
  const double share = seconds / (loops.bf16_dots ? 4 : 3);
  constexpr int64_t kIterations = 4000;
  MachinePeaks peaks;
  peaks.int8_gops = 1e-9 * best_rate(num_threads, share, [&](int) { return loops.int8_dots(kIterations); });
  if (loops.bf16_dots)
    peaks.bf16_gflops = 1e-9 * best_rate(num_threads, share, [&](int) { return loops.bf16_dots(kIterations); });
  peaks.fp32_gflops = 1e-9 * best_rate(num_threads, share, [&](int) { return loops.fp32_multiply_adds(kIterations); });
  peaks.read_gb_per_second = 1e-9 * read_rate(loops, num_threads, share);
  return peaks;
}

}  // namespace partita
