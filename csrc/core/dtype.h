// Element types of arrays that cross the library's border.
#pragma once

#include <cstddef>
#include <cstdint>

namespace partita {

enum class DType : uint8_t { kF32, kBF16, kF16, kI8, kU8, kI32, kI64, kU32, kU64, kF64, kE4M3 };

constexpr size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kI8:
    case DType::kU8:
    case DType::kE4M3:
      return 1;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF32:
    case DType::kI32:
    case DType::kU32:
      return 4;
    case DType::kI64:
    case DType::kU64:
    case DType::kF64:
      return 8;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kI8:
      return "int8";
    case DType::kU8:
      return "uint8";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kU32:
      return "uint32";
    case DType::kU64:
      return "uint64";
    case DType::kF64:
      return "float64";
    case DType::kE4M3:
      return "float8_e4m3fn";
  }
  return "?";
}

}  // namespace partita
