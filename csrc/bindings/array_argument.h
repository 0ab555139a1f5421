// Any array that speaks DLPack, the buffer protocol or __array_interface__ as a TensorView, uncopied.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/tensor_view.h"

namespace partita::bindings {

// Borrows the memory of `object` for as long as the ArrayArgument lives.
// Throws TypeMismatch (TypeError) when it is no array or its dtype is unknown; ValueError when it is not on the CPU,
// big-endian, misaligned, or read-only while `writable` is asked for. Strides are the op's to judge
// (TensorView::expect).
class ArrayArgument {
 public:
  ArrayArgument(pybind11::handle object, const char* name, bool writable = false);
  // The same for DLPack arrays in the memory of CUDA device `cuda_ordinal`; the producer's work is waited for on CUDA's
  // legacy default stream.
  static ArrayArgument on_cuda(pybind11::handle object, const char* name, int cuda_ordinal);
  const TensorView& view() const { return view_; }
  const TensorView* operator->() const { return &view_; }

 private:
  ArrayArgument() = default;
  bool from_array_interface(pybind11::handle object, bool writable);
  void read_array_interface(pybind11::handle object, bool writable);
  void check_dlpack_device(int32_t type, int32_t ordinal) const;
  bool from_dlpack(pybind11::handle object, bool writable);
  bool from_buffer(pybind11::handle object, bool writable);

  pybind11::object owner_;
  std::unique_ptr<pybind11::buffer_info> buffer_;  // held: releasing it would let a bytearray move
  TensorView view_;
  int cuda_ordinal_ = -1;  // not negative: the array must lie on this CUDA device
};

// "float32", "bfloat16" ...: throws ValueError for what is no element type.
DType dtype_named(const std::string& name);

}  // namespace partita::bindings
