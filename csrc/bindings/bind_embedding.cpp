#include "bindings/register.h"

namespace partita::bindings {

void register_embedding(pybind11::module_&) {}

}  // namespace partita::bindings
