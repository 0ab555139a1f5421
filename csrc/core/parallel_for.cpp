#include "core/parallel_for.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace partita {
namespace {

// cgroup v2 "max 100000" or "200000 100000"; v1 keeps quota and period in two files.
double cgroup_quota_cores() {
  std::string quota;
  double period = 0;
  if (std::ifstream v2{"/sys/fs/cgroup/cpu.max"}; v2 >> quota >> period) {
    return quota == "max" || period <= 0 ? 0 : std::stod(quota) / period;
  }
  double v1_quota = 0;
  std::ifstream quota_file{"/sys/fs/cgroup/cpu/cpu.cfs_quota_us"};
  std::ifstream period_file{"/sys/fs/cgroup/cpu/cpu.cfs_period_us"};
  if (quota_file >> v1_quota && period_file >> period && v1_quota > 0 && period > 0) return v1_quota / period;
  return 0;
}

}  // namespace

int usable_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  int cores = sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask)
                                                            : static_cast<int>(std::thread::hardware_concurrency());
  if (const double quota = cgroup_quota_cores(); quota > 0)
    cores = std::min(cores, std::max(1, static_cast<int>(std::ceil(quota))));
  return std::max(1, cores);
}

void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t, int)>& run) {
  if (num_threads <= 0) num_threads = usable_cores();
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, std::max<int64_t>(1, num_chunks)));
  std::atomic<int64_t> next_chunk{0};
  std::exception_ptr first_error;
  std::mutex error_mutex;
  auto work = [&](int worker_idx) {
    try {
      for (int64_t chunk; (chunk = next_chunk.fetch_add(1)) < num_chunks;) run(chunk, worker_idx);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!first_error) first_error = std::current_exception();
      next_chunk.store(num_chunks);
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(num_threads - 1);
  for (int worker_idx = 1; worker_idx < num_threads; ++worker_idx) threads.emplace_back(work, worker_idx);
  work(0);
  for (std::thread& thread : threads) thread.join();
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace partita
