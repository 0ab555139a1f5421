#include "attention/cpu/kv_rows_body.h"

namespace partita {
const KvRowKernel& kv_row_kernel_portable() { return kRowKernel; }
}  // namespace partita
