#include "bindings/register.h"

namespace partita::bindings {

void register_sampling(pybind11::module_&) {}

}  // namespace partita::bindings
