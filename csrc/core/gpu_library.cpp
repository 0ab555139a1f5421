#include "core/gpu_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "core/check.h"

namespace partita {
namespace {

// The folder of the shared object that holds this function.
std::string own_folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<const void*>(&gpu_library), &info) || !info.dli_fname) return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

GpuLibrary open_library(const std::string& world) {
  GpuLibrary opened;
  opened.world = world;
  opened.path = concat(own_folder(), "/libpartita_", world, ".so");
  if (const char* path = std::getenv("PARTITA_CUDA_LIBRARY"); path && *path && world == "cuda") opened.path = path;
  void* handle = dlopen(opened.path.c_str(), RTLD_NOW | RTLD_LOCAL);  // kept open for the life of the process
  if (!handle) {
    const char* error = dlerror();
    opened.reason = concat("this build has no ", world, " kernels (", error ? error : opened.path, ")");
    return opened;
  }
  const auto function = reinterpret_cast<DeviceLibraryFunction>(dlsym(handle, kDeviceLibrarySymbol));
  const DeviceLibrary* library = function ? function() : nullptr;
  if (!library || library->version != kDeviceLibraryVersion || library->world != world) {
    opened.reason = concat(opened.path, " is no device library of this build: got version ",
                           library ? library->version : 0, ", wanted ", kDeviceLibraryVersion);
    return opened;
  }
  opened.library = library;
  opened.num_devices = library->num_devices(&opened.reason);
  return opened;
}

}  // namespace

const GpuLibrary& gpu_library(const std::string& world) {
  PARTITA_CHECK(world == "cuda" || world == "simt", "world: got '", world, "', wanted cuda or simt");
  if (world == "cuda") {
    static const GpuLibrary cuda = open_library("cuda");
    return cuda;
  }
  static const GpuLibrary simt = open_library("simt");
  return simt;
}

std::shared_ptr<Gpu> open_gpu(const std::string& world, int ordinal) {
  const GpuLibrary& found = gpu_library(world);
  if (!found.library || found.num_devices == 0)
    throw std::runtime_error(concat("device ", world, ": cannot run: ", found.reason));
  PARTITA_CHECK(ordinal >= 0 && ordinal < found.num_devices, "ordinal: got ", ordinal, ", wanted 0 to ",
                found.num_devices - 1);
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, std::weak_ptr<Gpu>> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<Gpu>& slot = opened[{world, ordinal}];
  std::shared_ptr<Gpu> gpu = slot.lock();
  if (!gpu) slot = gpu = std::shared_ptr<Gpu>(found.library->open(ordinal));
  return gpu;
}

const KernelRegistry& kernels_of(const Gpu& gpu) { return *gpu_library(gpu.properties().world).library->registry; }

}  // namespace partita
