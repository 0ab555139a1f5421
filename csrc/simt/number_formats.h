// fp16, bf16 and e4m3 on the host, bit for bit as the device computes them. Only registers are touched, so kernels may
// inline this.
#pragma once

#include <cmath>
#include <cstdint>

namespace partita::simt {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float float_from_bf16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline float float_from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | rest << 13);  // infinity and NaN
  // The exponent biases differ by 112; the multiplication also gives subnormals their exponent.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

// NaN becomes 0x7fff, as on the device.
inline uint16_t f16_from_float(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 rounds to infinity
  // Below 2^-14 the addition of 0.5 rounds to multiples of 2^-24 and leaves the count in the low bits.
  if (magnitude < 0x38800000u)
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13));
}

inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t f16_from_e4m3(uint8_t code) {
  const uint32_t sign = uint32_t{code & 0x80u} << 8, rest = code & 0x7fu;
  if (rest == 0x7fu) return 0x7fffu;
  return static_cast<uint16_t>(sign | f16_from_float(float_from_f16(static_cast<uint16_t>(rest << 7)) * 256.0f));
}

inline uint8_t e4m3_from_float(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u)
    rounded = 0x7f;
  else if (magnitude >= 0x43e00000u)  // 448 and more
    rounded = 0x7e;
  else if (magnitude < 0x3c800000u)  // below 2^-6: multiples of 2^-9
    rounded = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
  else
    rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(rounded | (bits >> 24 & 0x80u));
}

// a + b in double, the last bit made odd when the sum is not exact: rounding it once more to fewer bits then gives what
// rounding the exact sum would.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  if (error == 0.0) return sum;
  uint64_t bits;
  __builtin_memcpy(&bits, &sum, 8);
  if ((bits & 1) == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return odd;
}

// Rounds to odd in fp32: keeps every bit that a following rounding to 16 bits looks at. Gradual underflow included.
inline float float_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || static_cast<double>(nearest) == value) {
    if (std::isinf(nearest) && std::isfinite(value)) return std::copysign(0x1.fffffep127f, nearest);
    return nearest;
  }
  uint32_t bits = bits_of(nearest);
  if ((bits & 1u) == 0) bits += (value > static_cast<double>(nearest)) == (value > 0.0) ? 1 : -1;
  return float_of(bits);
}

inline uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(float_from_f16(a)) * static_cast<double>(float_from_f16(b));
  return f16_from_float(float_to_odd(add_to_odd(product, static_cast<double>(float_from_f16(c)))));
}
// Sums and products of two halves are exact in double.
inline uint16_t add_f16(uint16_t a, uint16_t b) {
  return f16_from_float(float_to_odd(static_cast<double>(float_from_f16(a)) + static_cast<double>(float_from_f16(b))));
}
inline uint16_t sub_f16(uint16_t a, uint16_t b) {
  return f16_from_float(float_to_odd(static_cast<double>(float_from_f16(a)) - static_cast<double>(float_from_f16(b))));
}
inline uint16_t mul_f16(uint16_t a, uint16_t b) { return f16_from_float(float_from_f16(a) * float_from_f16(b)); }

inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(float_from_bf16(a)) * static_cast<double>(float_from_bf16(b));
  return bf16_from_float(float_to_odd(add_to_odd(product, static_cast<double>(float_from_bf16(c)))));
}

// One NaN gives the other operand, two give 0x7fff; -0 is less than +0.
inline bool is_less(float a, float b) { return a < b || (a == b && std::signbit(a) && !std::signbit(b)); }
inline uint16_t min_f16(uint16_t a, uint16_t b) {
  const float x = float_from_f16(a), y = float_from_f16(b);
  if (x != x) return y != y ? 0x7fffu : b;
  return y != y || !is_less(y, x) ? a : b;
}
inline uint16_t max_f16(uint16_t a, uint16_t b) {
  const float x = float_from_f16(a), y = float_from_f16(b);
  if (x != x) return y != y ? 0x7fffu : b;
  return y != y || !is_less(x, y) ? a : b;
}
inline uint16_t min_bf16(uint16_t a, uint16_t b) {
  const float x = float_from_bf16(a), y = float_from_bf16(b);
  if (x != x) return y != y ? 0x7fffu : b;
  return y != y || !is_less(y, x) ? a : b;
}
inline uint16_t max_bf16(uint16_t a, uint16_t b) {
  const float x = float_from_bf16(a), y = float_from_bf16(b);
  if (x != x) return y != y ? 0x7fffu : b;
  return y != y || !is_less(x, y) ? a : b;
}

}  // namespace partita::simt
