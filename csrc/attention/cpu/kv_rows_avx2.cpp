#include "attention/cpu/kv_rows_body.h"

namespace partita {
const KvRowKernel& kv_row_kernel_avx2() { return kRowKernel; }
}  // namespace partita
