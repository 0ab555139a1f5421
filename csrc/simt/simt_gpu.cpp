// The Gpu of the host execution. Streams run what is enqueued at once, on the calling thread; a stream that is being
// captured keeps it instead, and a graph runs it in order. So the order of one stream is that of a real one, while
// missing waits between streams do not show here.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "core/check.h"
#include "core/device_library.h"
#include "simt/simt.h"

namespace partita::simt {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kGuardBytes = 4096;  // after each allocation: what runs past the end does not land in the next one
// As much as anything here asks for; a small number of SMs makes plans split work as they would on a large chip.
constexpr size_t kMemoryBytes = size_t{8} << 30;
constexpr int kNumSms = 16;

using Time = std::chrono::steady_clock::time_point;

struct Stream {
  bool is_capturing = false;
  std::vector<std::function<void()>> captured;
};

struct Graph {
  std::vector<std::function<void()>> steps;
};

// Runs or records one piece of work.
void submit(GpuStream handle, std::function<void()> work) {
  PARTITA_CHECK(handle != nullptr, "stream: got none");
  Stream& stream = *static_cast<Stream*>(handle);
  if (stream.is_capturing)
    stream.captured.push_back(std::move(work));
  else
    work();
}

class SimtGpu final : public Gpu {
 public:
  explicit SimtGpu(int ordinal) {
    properties_.world = "simt";
    properties_.name = "host execution";
    properties_.ordinal = ordinal;
    properties_.compute_capability = 80;
    properties_.num_sms = kNumSms;
    properties_.memory_bytes = kMemoryBytes;
    properties_.l2_bytes = size_t{40} << 20;
    properties_.shared_bytes_per_block = 163 * 1024;
  }

  const GpuProperties& properties() const override { return properties_; }

  size_t free_bytes() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kMemoryBytes - std::min(kMemoryBytes, used_bytes_);
  }
  void* allocate(size_t bytes, const char* label) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (bytes > kMemoryBytes - std::min(kMemoryBytes, used_bytes_))
        throw std::runtime_error(concat("simt: out of memory: ", label, " wants ", bytes, " bytes"));
      used_bytes_ += bytes;
    }
    void* memory = ::operator new(bytes + kGuardBytes, std::align_val_t(kAlignment));
    std::memset(memory, 0xff, bytes);  // NaN, or an index far out of range: what nobody wrote shows
    register_allocation(memory, bytes, label);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[memory] = bytes;
    return memory;
  }
  void release(void* memory) noexcept override {
    unregister_allocation(memory);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = sizes_.find(memory);
      if (it == sizes_.end()) return;
      used_bytes_ -= it->second;
      sizes_.erase(it);
    }
    ::operator delete(memory, std::align_val_t(kAlignment));
  }
  // Kernels may read pinned memory too.
  void* allocate_pinned(size_t bytes) override { return allocate(bytes, "pinned"); }
  void release_pinned(void* memory) noexcept override { release(memory); }

  void copy(void* target, const void* source, size_t bytes, GpuCopy, GpuStream stream) override {
    if (bytes == 0) return;
    submit(stream, [=] { std::memmove(target, source, bytes); });
  }
  void fill(void* target, uint8_t byte, size_t bytes, GpuStream stream) override {
    submit(stream, [=] { std::memset(target, byte, bytes); });
  }

  GpuStream default_stream() override { return &default_stream_; }
  GpuStream create_stream() override { return new Stream; }
  void destroy_stream(GpuStream stream) noexcept override { delete static_cast<Stream*>(stream); }
  void synchronize(GpuStream) override {}

  GpuEvent create_event(bool) override { return new Time(); }
  void destroy_event(GpuEvent event) noexcept override { delete static_cast<Time*>(event); }
  void record(GpuEvent event, GpuStream) override { *static_cast<Time*>(event) = std::chrono::steady_clock::now(); }
  bool is_done(GpuEvent) override { return true; }
  void wait(GpuEvent) override {}
  void stream_wait(GpuStream, GpuEvent) override {}
  // The host's time, which orders what ran and says nothing of a GPU's.
  float elapsed_ms(GpuEvent begin, GpuEvent end) override {
    return std::chrono::duration<float, std::milli>(*static_cast<Time*>(end) - *static_cast<Time*>(begin)).count();
  }

  void begin_capture(GpuStream handle) override {
    Stream& stream = *static_cast<Stream*>(handle);
    PARTITA_CHECK(!stream.is_capturing, "stream: is being captured already");
    stream.is_capturing = true;
    stream.captured.clear();
  }
  GpuGraph end_capture(GpuStream handle) override {
    Stream& stream = *static_cast<Stream*>(handle);
    PARTITA_CHECK(stream.is_capturing, "stream: is not being captured");
    stream.is_capturing = false;
    return new Graph{std::move(stream.captured)};
  }
  void launch_graph(GpuGraph graph, GpuStream stream) override {
    submit(stream, [graph] {
      for (const auto& step : static_cast<Graph*>(graph)->steps) step();
    });
  }
  void destroy_graph(GpuGraph graph) noexcept override { delete static_cast<Graph*>(graph); }

  // Rounded to multiples of two SMs; the parts have streams of their own and no SMs to keep apart.
  std::vector<GpuRung> make_rungs(const std::vector<int>& first_sms) override {
    std::vector<GpuRung> rungs;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int wanted : first_sms) {
      const int granted = std::max(2, std::min(kNumSms - 2, (wanted + 1) / 2 * 2));
      if (!rungs.empty() && rungs.back().first_sms == granted) continue;
      const auto found = idle_rungs_.find(granted);
      if (found == idle_rungs_.end()) {
        rungs.push_back({granted, kNumSms - granted, create_stream(), create_stream()});
        all_rungs_.push_back(rungs.back());
      } else {
        rungs.push_back(found->second);
        idle_rungs_.erase(found);
      }
    }
    return rungs;
  }
  void return_rungs(const std::vector<GpuRung>& rungs) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const GpuRung& rung : rungs) idle_rungs_.emplace(rung.first_sms, rung);
  }
  std::string partition_note() const override { return "host execution: parts of the chip are streams only"; }

  ~SimtGpu() override {
    for (const GpuRung& rung : all_rungs_) {
      destroy_stream(rung.first);
      destroy_stream(rung.second);
    }
  }

 private:
  GpuProperties properties_;
  std::mutex mutex_;
  std::map<void*, size_t> sizes_;
  size_t used_bytes_ = 0;
  Stream default_stream_;
  std::vector<GpuRung> all_rungs_;
  std::multimap<int, GpuRung> idle_rungs_;  // by the SMs granted to the first part
};

int num_devices(std::string*) { return 1; }
Gpu* open_device(int ordinal) { return new SimtGpu(ordinal); }

std::vector<std::string> take_sites() {
  std::vector<std::string> sites = visited_sites();
  reset_visited_sites();
  return sites;
}

SimtControls::Statistics read_statistics() {
  const Statistics s = statistics();
  return {s.num_launches, s.num_threads, s.num_checked_accesses, s.num_reports};
}

const SimtControls kControls{&set_seed, &set_disabled_site, &take_sites, &read_statistics};

}  // namespace

void enqueue(void* stream, LaunchRecord record) {
  submit(stream, [record = std::move(record)] { run_launch(record); });
}

}  // namespace partita::simt

extern "C" __attribute__((visibility("default"))) const partita::DeviceLibrary* partita_device_library() {
  static const partita::DeviceLibrary library{partita::kDeviceLibraryVersion,       "simt",
                                              "host compiler " __VERSION__,         "sm_80 family",
                                              &partita::registry_of_this_library(), &partita::simt::num_devices,
                                              &partita::simt::open_device,          &partita::simt::kControls};
  return &library;
}
