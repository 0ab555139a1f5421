#include "bindings/register.h"

namespace partita::bindings {

void register_activation(pybind11::module_&) {}

}  // namespace partita::bindings
