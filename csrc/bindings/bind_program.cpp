#include "bindings/register.h"

namespace partita::bindings {

void register_program(pybind11::module_&) {}

}  // namespace partita::bindings
