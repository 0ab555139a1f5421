// Twin of csrc/device/ptx_math.cuh: the exact functions, where the device approximates.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

inline float ex2_approx(float x) { return std::exp2(x); }
inline float lg2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float tanh_approx(float x) { return std::tanh(x); }

}  // namespace partita::device
