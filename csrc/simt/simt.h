// Host execution of the CUDA sources: what the rest of the device library sees of it. See README.md.
//
// A launch runs on the calling OS thread, block after block; every CUDA thread is a fiber. Several OS threads may run
// launches at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/dim3.h"

namespace partita::simt {

// What a Hopper block may ask for; the launch gets exactly what it asks for.
constexpr size_t kMaxSharedBytes = 227 * 1024;

// One kernel launch with its arguments by value. May be kept and run many times (graphs).
struct LaunchRecord {
  std::string name;
  Dim3 grid, block;
  size_t shared_bytes = 0;
  std::shared_ptr<const void> arguments;
  void (*thread_body)(const void* arguments) = nullptr;  // one CUDA thread
};

// Runs the launch to its end. Throws std::runtime_error with the first thing found wrong: kernel, block, thread and
// what it did. Memory that the kernel had written until then stays written.
void run_launch(const LaunchRecord& record);

// Runs or records the launch; simt_gpu.cpp's, which has the streams.
void enqueue(void* stream, LaunchRecord record);

// Global memory that kernels may touch. The bytes around an allocation should belong to no other.
void register_allocation(void* address, size_t bytes, const char* label);
void unregister_allocation(void* address);

// Order in which warps run, for launches that begin after this; 0: ascending. At first PARTITA_SIMT_SEED, or 0.
void set_seed(uint64_t seed);

// "rms_norm.cu:40": this barrier or wait does nothing, for launches that begin after this; "": all are on again. Any
// longer end of the path may be given.
void set_disabled_site(const std::string& site);

// The barriers and waits that ran since the last reset, as "path:line", sorted.
std::vector<std::string> visited_sites();
void reset_visited_sites();

// Since the process began.
struct Statistics {
  uint64_t num_launches = 0, num_threads = 0, num_checked_accesses = 0, num_reports = 0;
};
Statistics statistics();

}  // namespace partita::simt
