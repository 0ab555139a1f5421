#include "bindings/register.h"

namespace partita::bindings {

void register_attention(pybind11::module_&) {}

}  // namespace partita::bindings
