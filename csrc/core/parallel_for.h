// Runs independent chunks of one op on a team of threads: what bindings, packing and kernel benches
// use outside a program. Inside a program the lanes do this (program/lane.h).
#pragma once

#include <cstdint>
#include <functional>

namespace partita {

// Calls run(chunk, worker_idx) once for each chunk in [0, num_chunks); any order, any worker in
// [0, num_threads). Chunks are claimed from an atomic counter. num_threads <= 0: all usable cores.
// The first exception thrown by a chunk is rethrown here after all workers have stopped.
void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t, int)>& run);

// Cores this process may really use: affinity mask and cgroup quota, at least 1.
int usable_cores();

}  // namespace partita
