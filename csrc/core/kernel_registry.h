// The kernels that a device library holds, by family. Each instantiation lies in a .cu file of its own and registers
// itself there, so a library built from a subset simply has fewer candidates.
//
//   // norm/norm_gpu.h: the family's entry type
//   struct RmsNormKernel {
//     static constexpr const char* kFamily = "rms_norm";
//     KernelInfo info;
//     void (*launch)(const RmsNormGpuParams& params, void* stream);
//   };
//   // norm/cuda/rms_norm.cu
//   const KernelRegistration<RmsNormKernel> kRegistered({{"rms_norm_rows", ""}, &launch_rms_norm});
//
// Launch functions throw std::runtime_error when the launch fails, and return before the kernel has run.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace partita {

struct KernelInfo {
  const char* name;
  // Where this kernel has passed its tests on hardware ("H100 2026-12-01"), or "": never. What never ran is no default
  // while a verified candidate fits.
  const char* verified_on;
};

class KernelRegistry {
 public:
  void add(const char* family, const void* entry) { entries_[family].push_back(entry); }
  // In no particular order: who chooses among them orders them by what they are.
  template <typename Entry>
  std::vector<const Entry*> all() const {
    std::vector<const Entry*> found;
    const auto it = entries_.find(Entry::kFamily);
    if (it != entries_.end())
      for (const void* entry : it->second) found.push_back(static_cast<const Entry*>(entry));
    return found;
  }
  // For families of one kernel. Null when this library was built without it.
  template <typename Entry>
  const Entry* only() const {
    const std::vector<const Entry*> found = all<Entry>();
    return found.empty() ? nullptr : found[0];
  }
  const std::map<std::string, std::vector<const void*>>& families() const { return entries_; }
  // Every family's entry begins with its info.
  static const KernelInfo& info_of(const void* entry) { return *static_cast<const KernelInfo*>(entry); }

 private:
  std::map<std::string, std::vector<const void*>> entries_;
};

// The registry of the device library that this code is linked into.
KernelRegistry& registry_of_this_library();

template <typename Entry>
class KernelRegistration {
 public:
  explicit KernelRegistration(const Entry& entry) : entry_(entry) {
    static_assert(offsetof(Entry, info) == 0, "an entry begins with its KernelInfo");
    registry_of_this_library().add(Entry::kFamily, &entry_);
  }
  KernelRegistration(const KernelRegistration&) = delete;
  KernelRegistration& operator=(const KernelRegistration&) = delete;

 private:
  Entry entry_;
};

}  // namespace partita
