// Linked into each device library, never into the kernel library that opens them.
#include "core/kernel_registry.h"

namespace partita {

KernelRegistry& registry_of_this_library() {
  static KernelRegistry registry;
  return registry;
}

}  // namespace partita
