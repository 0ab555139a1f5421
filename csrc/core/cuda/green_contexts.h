// Disjoint sets of a device's SMs with streams of their own: the driver's green contexts.
#pragma once

#include <cuda.h>

#include <string>
#include <vector>

#include "core/gpu.h"

namespace partita {

// The entries of the driver API that green contexts need, found at run time: a machine without a driver, or with one
// that is older, still opens this library.
class GreenContexts {
 public:
  // `ordinal` is the current device, its primary context alive. Never throws: note() says why nothing can be split.
  explicit GreenContexts(int ordinal);
  ~GreenContexts();
  GreenContexts(const GreenContexts&) = delete;
  GreenContexts& operator=(const GreenContexts&) = delete;

  // A split with about `first_sms` SMs in its first part, rounded to what the device grants, and all others in the
  // second. Throws std::invalid_argument where the chip is too small for two parts; std::runtime_error when the driver
  // refuses. The streams live as long as this object.
  GpuRung make_rung(int first_sms);
  // What a wanted size is rounded to: up, but leaving a part's worth.
  int granted(int first_sms) const;

  bool is_available() const { return is_available_; }
  int num_sms() const { return static_cast<int>(whole_.sm.smCount); }
  int granularity() const { return granularity_; }
  const std::string& note() const { return note_; }

 private:
  struct Driver;
  struct Part {
    CUgreenCtx context;
    CUstream stream;
  };
  Part make_part(CUdevResource resource);
  void check(CUresult status, const char* call) const;

  Driver* driver_ = nullptr;
  int ordinal_;
  bool is_available_ = false;
  CUdevResource whole_{};
  int smallest_ = 0, granularity_ = 0;  // SMs
  std::string note_;
  std::vector<Part> parts_;
};

}  // namespace partita
