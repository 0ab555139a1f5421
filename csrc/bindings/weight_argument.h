// runtime._native.Weight: a matrix as its file holds it, with the Python object that owns the bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "gemm/gemm.h"

namespace partita::bindings {

class WeightArgument {
 public:
  WeightArgument(Weight weight, pybind11::object owner) : weight_(std::move(weight)), owner_(std::move(owner)) {}

  const Weight& weight() const { return weight_; }

  // Keeps the bytes alive from native code that may let go on a thread without the GIL.
  std::shared_ptr<const void> shared_owner() const {
    auto* held = new pybind11::object(owner_);
    return std::shared_ptr<const void>(held, [](const void* pointer) {
      const pybind11::gil_scoped_acquire gil;
      delete static_cast<const pybind11::object*>(pointer);
    });
  }

 private:
  Weight weight_;
  pybind11::object owner_;
};

}  // namespace partita::bindings
