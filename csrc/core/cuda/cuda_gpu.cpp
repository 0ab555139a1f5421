// The Gpu of a CUDA device, over the CUDA runtime. Streams other than the default one do not wait for the legacy
// stream; the default stream is the legacy stream itself, so it is ordered with what other libraries enqueue there.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/check.h"
#include "core/cuda/green_contexts.h"
#include "core/device_library.h"

namespace partita {
namespace {

template <typename... Parts>
void check(cudaError_t status, const Parts&... call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(concat(call..., ": ", cudaGetErrorString(status), " (", static_cast<int>(status), ")"));
}

cudaStream_t stream_of(GpuStream stream) {
  PARTITA_CHECK(stream != nullptr, "stream: got none");
  return static_cast<cudaStream_t>(stream);
}
cudaEvent_t event_of(GpuEvent event) { return static_cast<cudaEvent_t>(event); }

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, ordinal), "cudaDeviceGetAttribute(", static_cast<int>(which), ")");
  return value;
}

class CudaGpu final : public Gpu {
 public:
  explicit CudaGpu(int ordinal) {
    check(cudaSetDevice(ordinal), "cudaSetDevice(", ordinal, ")");
    cudaDeviceProp found{};
    check(cudaGetDeviceProperties(&found, ordinal), "cudaGetDeviceProperties(", ordinal, ")");
    properties_.world = "cuda";
    properties_.name = found.name;
    properties_.ordinal = ordinal;
    properties_.compute_capability = found.major * 10 + found.minor;
    properties_.num_sms = found.multiProcessorCount;
    properties_.memory_bytes = found.totalGlobalMem;
    properties_.l2_bytes = static_cast<size_t>(found.l2CacheSize);
    properties_.shared_bytes_per_block = found.sharedMemPerBlockOptin;
    // Two transfers a clock. The attributes, not the struct: CUDA 13 took the clock out of it.
    const double clock_khz = attribute(cudaDevAttrMemoryClockRate, ordinal);
    const double bus_bits = attribute(cudaDevAttrGlobalMemoryBusWidth, ordinal);
    properties_.memory_gb_per_second = 2 * clock_khz * 1e3 * bus_bits / 8 / 1e9;
    check(cudaFree(nullptr), "cudaFree(null)");  // makes the primary context, which green contexts share
    green_ = std::make_unique<GreenContexts>(ordinal);
  }

  const GpuProperties& properties() const override { return properties_; }

  size_t free_bytes() override {
    use();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
  }
  void* allocate(size_t bytes, const char* label) override {
    use();
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc(", bytes, " bytes for ", label, ")");
    return memory;
  }
  void release(void* memory) noexcept override {
    cudaSetDevice(properties_.ordinal);
    cudaFree(memory);
    cudaGetLastError();  // at exit the driver may be gone already
  }
  void* allocate_pinned(size_t bytes) override {
    use();
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "cudaHostAlloc(", bytes, " bytes)");
    return memory;
  }
  void release_pinned(void* memory) noexcept override {
    cudaFreeHost(memory);
    cudaGetLastError();
  }

  void copy(void* target, const void* source, size_t bytes, GpuCopy direction, GpuStream stream) override {
    if (bytes == 0) return;
    use();
    const cudaMemcpyKind kind = direction == GpuCopy::kHostToDevice   ? cudaMemcpyHostToDevice
                                : direction == GpuCopy::kDeviceToHost ? cudaMemcpyDeviceToHost
                                                                      : cudaMemcpyDeviceToDevice;
    check(cudaMemcpyAsync(target, source, bytes, kind, stream_of(stream)), "cudaMemcpyAsync(", bytes, " bytes)");
  }
  void fill(void* target, uint8_t byte, size_t bytes, GpuStream stream) override {
    if (bytes == 0) return;
    use();
    check(cudaMemsetAsync(target, byte, bytes, stream_of(stream)), "cudaMemsetAsync(", bytes, " bytes)");
  }

  GpuStream default_stream() override { return cudaStreamLegacy; }
  GpuStream create_stream() override {
    use();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream;
  }
  void destroy_stream(GpuStream stream) noexcept override {
    cudaSetDevice(properties_.ordinal);
    cudaStreamDestroy(static_cast<cudaStream_t>(stream));
    cudaGetLastError();
  }
  void synchronize(GpuStream stream) override {
    use();
    check(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize");
  }

  GpuEvent create_event(bool is_timed) override {
    use();
    cudaEvent_t event = nullptr;
    // Blocking: a thread that waits sleeps, and leaves its core to the engine.
    const unsigned flags = cudaEventBlockingSync | (is_timed ? 0u : static_cast<unsigned>(cudaEventDisableTiming));
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags");
    return event;
  }
  void destroy_event(GpuEvent event) noexcept override {
    cudaEventDestroy(event_of(event));
    cudaGetLastError();
  }
  void record(GpuEvent event, GpuStream stream) override {
    use();
    check(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
  }
  bool is_done(GpuEvent event) override {
    use();
    const cudaError_t status = cudaEventQuery(event_of(event));
    if (status == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(status, "cudaEventQuery");
    return true;
  }
  void wait(GpuEvent event) override {
    use();
    check(cudaEventSynchronize(event_of(event)), "cudaEventSynchronize");
  }
  void stream_wait(GpuStream stream, GpuEvent event) override {
    use();
    check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "cudaStreamWaitEvent");
  }
  float elapsed_ms(GpuEvent begin, GpuEvent end) override {
    use();
    float ms = 0;
    check(cudaEventElapsedTime(&ms, event_of(begin), event_of(end)), "cudaEventElapsedTime");
    return ms;
  }

  // Other threads go on as they like while this one captures.
  void begin_capture(GpuStream stream) override {
    use();
    check(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  }
  GpuGraph end_capture(GpuStream stream) override {
    use();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_of(stream), &graph), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
    return executable;
  }
  void launch_graph(GpuGraph graph, GpuStream stream) override {
    use();
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream_of(stream)), "cudaGraphLaunch");
  }
  void destroy_graph(GpuGraph graph) noexcept override {
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
    cudaGetLastError();
  }

  std::vector<GpuRung> make_rungs(const std::vector<int>& first_sms) override {
    std::vector<GpuRung> rungs;
    if (!green_->is_available()) return rungs;
    use();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int wanted : first_sms) {
      const int granted = green_->granted(wanted);
      if (!rungs.empty() && rungs.back().first_sms == granted) continue;
      const auto found = idle_rungs_.find(granted);
      rungs.push_back(found == idle_rungs_.end() ? green_->make_rung(wanted) : found->second);
      if (found != idle_rungs_.end()) idle_rungs_.erase(found);
    }
    return rungs;
  }
  void return_rungs(const std::vector<GpuRung>& rungs) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const GpuRung& rung : rungs) idle_rungs_.emplace(rung.first_sms, rung);
  }
  std::string partition_note() const override { return green_->note(); }

 private:
  // A thread's current device is its own affair; every call sets it.
  void use() const { check(cudaSetDevice(properties_.ordinal), "cudaSetDevice(", properties_.ordinal, ")"); }

  GpuProperties properties_;
  std::mutex mutex_;
  std::multimap<int, GpuRung> idle_rungs_;  // by the SMs granted to the first part
  std::unique_ptr<GreenContexts> green_;
};

// "80-real,90a-real": whether one of them is machine code for this capability. Code for 8.0 runs on every 8.x; code
// with an "a" on that very capability alone; PTX (no "-real") on everything from its own on.
bool has_machine_code(int compute_capability) {
  std::string text = PARTITA_CUDA_TARGETS;
  while (!text.empty()) {
    const size_t comma = text.find(',');
    const std::string target = text.substr(0, comma);
    text = comma == std::string::npos ? "" : text.substr(comma + 1);
    size_t end = 0;
    const int version = std::stoi(target, &end);
    const bool is_exact = end < target.size() && target[end] == 'a';
    const bool is_real = target.find("-real") != std::string::npos;
    if (is_exact ? compute_capability == version
                 : compute_capability >= version && (!is_real || compute_capability / 10 == version / 10))
      return true;
  }
  return false;
}

// "570.86.15": what the kernel module says of itself; empty where it says nothing.
std::string driver_release() {
  std::FILE* file = std::fopen("/proc/driver/nvidia/version", "r");
  if (!file) return "";
  char line[256] = "";
  const char* read = std::fgets(line, sizeof line, file);
  std::fclose(file);
  std::string text = read ? line : "";
  const size_t module = text.find("Kernel Module");
  if (module == std::string::npos) return "";
  const size_t begin = text.find_first_of("0123456789", module);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_first_not_of("0123456789.", begin) - begin);
}

// Why device `ordinal` cannot run these kernels; empty when it can.
std::string refusal(int ordinal) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess) {
    cudaGetLastError();
    return concat("device ", ordinal, " does not answer");
  }
  if (major < 8)
    return concat("device ", ordinal, " has compute capability ", major, ".", minor, ", wanted at least 8.0");
  if (!has_machine_code(major * 10 + minor))
    return concat("device ", ordinal, " has compute capability ", major, ".", minor,
                  ", this build has machine code for ", PARTITA_CUDA_TARGETS);
  return "";
}

int num_devices(std::string* reason) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    *reason = "no driver: libcuda.so.1 cannot be opened";
    return 0;
  }
  // A runtime runs on any driver of its own major version; each of those began with one driver release.
  constexpr int kToolkitMajor = CUDART_VERSION / 1000;
  constexpr int kFirstRelease = kToolkitMajor >= 13 ? 580 : 525;
  if (driver / 1000 < kToolkitMajor) {
    const std::string release = driver_release();
    *reason = concat("needs a driver >= ", kFirstRelease, " when built with CUDA ", kToolkitMajor, ", found ",
                     release.empty() ? "one" : release, " of CUDA ", driver / 1000, ".", driver % 1000 / 10);
    return 0;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    *reason = status == cudaSuccess || status == cudaErrorNoDevice
                  ? "the driver finds no device"
                  : concat("cudaGetDeviceCount: ", cudaGetErrorString(status), " (", static_cast<int>(status), ")");
    return 0;
  }
  std::string why;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    const std::string found = refusal(ordinal);
    if (found.empty()) return count;
    why += (why.empty() ? "" : "; ") + found;
  }
  *reason = why;
  return 0;
}

Gpu* open_device(int ordinal) {
  const std::string why = refusal(ordinal);
  if (!why.empty()) throw std::runtime_error(concat("device cuda: ", why));
  return new CudaGpu(ordinal);
}

}  // namespace
}  // namespace partita

extern "C" __attribute__((visibility("default"))) const partita::DeviceLibrary* partita_device_library() {
  static const partita::DeviceLibrary library{partita::kDeviceLibraryVersion,
                                              "cuda",
                                              PARTITA_CUDA_TOOLKIT,
                                              PARTITA_CUDA_TARGETS,
                                              &partita::registry_of_this_library(),
                                              &partita::num_devices,
                                              &partita::open_device,
                                              nullptr};
  return &library;
}
