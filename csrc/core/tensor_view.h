// A borrowed array: pointer, element type, shape, strides. Owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/dtype.h"

namespace partita {

struct TensorView {
  static constexpr int kMaxDims = 6;

  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  const char* name = "array";               // of the argument, for messages

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t num_elements() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= shape[d];
    return count;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
    return text + "]";
  }

  // Throws unless the view has this type, these sizes (-1 = any) and lies contiguously.
  const TensorView& expect(DType wanted, std::initializer_list<int64_t> sizes) const {
    if (dtype != wanted)
      throw TypeMismatch(concat(name, ": got dtype ", dtype_name(dtype), ", wanted ", dtype_name(wanted)));
    bool same = ndim == static_cast<int>(sizes.size());
    int d = 0;
    std::string wanted_shape = "[";
    for (int64_t size : sizes) {
      if (same && size >= 0 && shape[d] != size) same = false;
      wanted_shape += (d ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
      ++d;
    }
    PARTITA_CHECK(same, name, ": got shape ", shape_text(), ", wanted ", wanted_shape, "]");
    PARTITA_CHECK(is_contiguous(), name, ": got a strided array of shape ", shape_text(), ", wanted a contiguous one");
    return *this;
  }
};

}  // namespace partita
