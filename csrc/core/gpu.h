// One GPU as everything above the device libraries sees it: memory, streams, events, graphs, partitions of its SMs.
//
// Two worlds implement it: CUDA (core/cuda/cuda_gpu.cpp) and simt (simt/simt_gpu.cpp), which runs the same kernel
// sources on the host, for tests. A call that fails throws std::runtime_error with the call's name; bad arguments
// throw std::invalid_argument. Every function may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace partita {

struct GpuProperties {
  std::string world;  // "cuda" or "simt"
  std::string name;   // "NVIDIA H100 80GB HBM3"
  int ordinal = 0;
  int compute_capability = 0;  // 80, 89, 90, 120
  int num_sms = 0;
  size_t memory_bytes = 0;
  size_t l2_bytes = 0;
  size_t shared_bytes_per_block = 0;  // most that one block may ask for
  double memory_gb_per_second = 0;    // data-sheet peak from clock and bus width; 0: unknown
};

// Opaque handles of one world. A null stream is not allowed: every launch names its stream.
using GpuStream = void*;
using GpuEvent = void*;
using GpuGraph = void*;

enum class GpuCopy { kHostToDevice, kDeviceToHost, kDeviceToDevice };

// A two-way split of the chip: two disjoint sets of SMs, each with a stream of its own. One rung of the ladder that
// lanes climb.
struct GpuRung {
  int first_sms = 0, second_sms = 0;  // granted
  GpuStream first = nullptr, second = nullptr;
};

class Gpu {
 public:
  virtual ~Gpu() = default;
  virtual const GpuProperties& properties() const = 0;

  // Memory. Addresses are multiples of 256. `label` names the piece in error reports.
  virtual size_t free_bytes() = 0;
  virtual void* allocate(size_t bytes, const char* label) = 0;
  virtual void release(void* memory) noexcept = 0;
  // Host memory that copies can reach without staging.
  virtual void* allocate_pinned(size_t bytes) = 0;
  virtual void release_pinned(void* memory) noexcept = 0;

  // In the order of the stream; host memory must be pinned for the copy to overlap anything.
  virtual void copy(void* target, const void* source, size_t bytes, GpuCopy direction, GpuStream stream) = 0;
  virtual void fill(void* target, uint8_t byte, size_t bytes, GpuStream stream) = 0;

  // Streams over the whole chip. `default_stream` lives as long as the Gpu.
  virtual GpuStream default_stream() = 0;
  virtual GpuStream create_stream() = 0;
  virtual void destroy_stream(GpuStream stream) noexcept = 0;
  virtual void synchronize(GpuStream stream) = 0;

  virtual GpuEvent create_event(bool is_timed) = 0;
  virtual void destroy_event(GpuEvent event) noexcept = 0;
  virtual void record(GpuEvent event, GpuStream stream) = 0;
  virtual bool is_done(GpuEvent event) = 0;
  virtual void wait(GpuEvent event) = 0;  // the calling thread sleeps
  virtual void stream_wait(GpuStream stream, GpuEvent event) = 0;
  virtual float elapsed_ms(GpuEvent begin, GpuEvent end) = 0;

  // What is enqueued on the stream between begin and end runs only when the graph is launched, and again each time.
  virtual void begin_capture(GpuStream stream) = 0;
  virtual GpuGraph end_capture(GpuStream stream) = 0;
  virtual void launch_graph(GpuGraph graph, GpuStream stream) = 0;
  virtual void destroy_graph(GpuGraph graph) noexcept = 0;

  // Splits of the chip, one for each wanted size of the first part, rounded to what the device grants and without
  // duplicates; empty, with the reason in partition_note(), where the driver cannot split it. They are the
  // caller's until return_rungs, which keeps them for the next who asks: a process holds only so many contexts.
  virtual std::vector<GpuRung> make_rungs(const std::vector<int>& first_sms) = 0;
  virtual void return_rungs(const std::vector<GpuRung>& rungs) noexcept = 0;
  virtual std::string partition_note() const = 0;
};

// Device memory that frees itself.
class GpuBuffer {
 public:
  GpuBuffer() = default;
  GpuBuffer(std::shared_ptr<Gpu> gpu, size_t bytes, const char* label)
      : gpu_(std::move(gpu)), data_(bytes ? gpu_->allocate(bytes, label) : nullptr), bytes_(bytes) {}
  GpuBuffer(GpuBuffer&& other) noexcept { swap(other); }
  GpuBuffer& operator=(GpuBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GpuBuffer() {
    if (data_) gpu_->release(data_);
  }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  const std::shared_ptr<Gpu>& gpu() const { return gpu_; }

 private:
  void swap(GpuBuffer& other) noexcept {
    std::swap(gpu_, other.gpu_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<Gpu> gpu_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Pinned host memory that frees itself.
class GpuPinnedBuffer {
 public:
  GpuPinnedBuffer() = default;
  GpuPinnedBuffer(std::shared_ptr<Gpu> gpu, size_t bytes)
      : gpu_(std::move(gpu)), data_(bytes ? gpu_->allocate_pinned(bytes) : nullptr), bytes_(bytes) {}
  GpuPinnedBuffer(GpuPinnedBuffer&& other) noexcept { swap(other); }
  GpuPinnedBuffer& operator=(GpuPinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GpuPinnedBuffer() {
    if (data_) gpu_->release_pinned(data_);
  }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void swap(GpuPinnedBuffer& other) noexcept {
    std::swap(gpu_, other.gpu_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<Gpu> gpu_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace partita
