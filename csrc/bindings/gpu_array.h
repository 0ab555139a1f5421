// Device memory as arrays that Python can hold, and any array on a GPU as an argument.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "core/gpu.h"
#include "core/tensor_view.h"

namespace partita::bindings {

// An array in the memory of one Gpu, contiguous.
class GpuArray {
 public:
  GpuArray(std::shared_ptr<Gpu> gpu, std::vector<int64_t> shape, DType dtype);

  // Both wait for the Gpu's default stream.  host: an array of the same shape and dtype
  void upload(pybind11::handle host);
  void download(pybind11::handle host) const;

  const std::shared_ptr<Gpu>& gpu() const { return buffer_.gpu(); }
  const TensorView& view() const { return view_; }
  const GpuBuffer& buffer() const { return buffer_; }

 private:
  GpuBuffer buffer_;
  TensorView view_;
};

// Borrows a GpuArray, or what another library has on the same CUDA device (DLPack).
// Throws TypeMismatch when it is neither, ValueError when it lies on another device or is not contiguous.
class GpuArrayArgument {
 public:
  GpuArrayArgument(const Gpu& gpu, pybind11::handle object, const char* name);
  const TensorView& view() const { return view_; }
  const TensorView* operator->() const { return &view_; }

 private:
  pybind11::object owner_;
  TensorView view_;
};

// The Gpu of the first GpuArray among the objects; throws TypeMismatch when there is none.
std::shared_ptr<Gpu> gpu_of(std::initializer_list<pybind11::handle> objects);
bool is_gpu_array(pybind11::handle object);
// A GpuArray, or an array that says by DLPack that it lies on a CUDA device: which half of an op is meant.
bool is_on_gpu(pybind11::handle object);

// An optional stream argument: None is the Gpu's default stream, an int a stream's address.
GpuStream stream_argument(Gpu& gpu, const pybind11::object& stream);

}  // namespace partita::bindings
