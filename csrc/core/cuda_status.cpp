#include "core/cuda_status.h"

#include <dlfcn.h>

#include <stdexcept>

#include "core/check.h"
#include "core/gpu_library.h"

namespace partita {
namespace {

// The few entries of the driver API that a status needs; its ABI is stable, so no CUDA header is wanted.
struct Driver {
  int (*init)(unsigned flags);
  int (*get_version)(int* version);
  int (*get_device_count)(int* count);
  int (*get_device)(int* device, int ordinal);
  int (*get_name)(char* name, int length, int device);
  int (*get_memory)(size_t* bytes, int device);
  int (*get_attribute)(int* value, int attribute, int device);
  int (*get_error_string)(int error, const char** text);
};
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute

template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

void query_driver(CudaStatus* status) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // kept open for the life of the process
  if (!library) {
    status->reason = "no driver: libcuda.so.1 cannot be opened";
    return;
  }
  Driver driver{};
  if (!find(library, "cuInit", &driver.init) || !find(library, "cuDriverGetVersion", &driver.get_version) ||
      !find(library, "cuDeviceGetCount", &driver.get_device_count) ||
      !find(library, "cuDeviceGet", &driver.get_device) || !find(library, "cuDeviceGetName", &driver.get_name) ||
      !find(library, "cuDeviceTotalMem_v2", &driver.get_memory) ||
      !find(library, "cuDeviceGetAttribute", &driver.get_attribute) ||
      !find(library, "cuGetErrorString", &driver.get_error_string)) {
    status->reason = "no driver: libcuda.so.1 lacks entries of the driver API";
    return;
  }
  int version = 0;
  if (driver.get_version(&version) == 0 && version > 0) {
    status->has_driver = true;
    status->driver = concat(version / 1000, ".", version % 1000 / 10);
  }
  int count = 0;
  int error = driver.init(0);
  if (error == 0) error = driver.get_device_count(&count);
  if (error != 0) {
    const char* text = nullptr;
    driver.get_error_string(error, &text);
    status->reason = concat("the driver does not start: ", text ? text : "unknown error", " (", error, ")");
    return;
  }
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CudaDevice found;
    int device = 0;
    char name[256] = "";
    if (driver.get_device(&device, ordinal) != 0) continue;
    driver.get_name(name, sizeof name, device);
    found.name = name;
    driver.get_memory(&found.memory_bytes, device);
    driver.get_attribute(&found.compute_capability_major, kCapabilityMajor, device);
    driver.get_attribute(&found.compute_capability_minor, kCapabilityMinor, device);
    driver.get_attribute(&found.num_multiprocessors, kMultiprocessorCount, device);
    status->devices.push_back(found);
  }
  if (status->devices.empty()) status->reason = "the driver finds no device";
}

CudaStatus query_status() {
  CudaStatus status;
  query_driver(&status);
  const GpuLibrary& library = gpu_library("cuda");
  status.is_compiled = library.library != nullptr;
  if (status.is_compiled) {
    status.toolkit = library.library->toolkit;
    status.targets = library.library->targets;
  } else {
    status.reason = concat(library.reason, "; PARTITA_CUDA=on with nvcc on the path builds them");
  }
  if (status.reason.empty() && status.devices[0].compute_capability_major < 8)
    status.reason = concat("device 0, ", status.devices[0].name, ", has compute capability ",
                           status.devices[0].compute_capability_major, ".", status.devices[0].compute_capability_minor,
                           ", wanted at least 8.0");
  if (status.reason.empty() && library.num_devices == 0) status.reason = library.reason;
  return status;
}

}  // namespace

const CudaStatus& cuda_status() {
  static const CudaStatus status = query_status();
  return status;
}

}  // namespace partita
