// A bound Weight: the borrowed matrix together with the Python object whose memory it is.
#pragma once

#include <memory>
#include <vector>

#include "bindings/array_argument.h"
#include "gemm/gemm.h"

namespace partita::bindings {

struct WeightArgument {
  ArrayArgument array;  // keeps the memory alive
  Weight weight;
};

using SharedWeight = std::shared_ptr<WeightArgument>;

inline std::vector<Weight> borrowed_weights(const std::vector<SharedWeight>& arguments) {
  std::vector<Weight> weights;
  for (const SharedWeight& argument : arguments) weights.push_back(argument->weight);
  return weights;
}

}  // namespace partita::bindings
