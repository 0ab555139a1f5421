// What sampling/cpu/logit_scan_<isa>.cpp define; logit_scan.cpp chooses among them.
#pragma once

#include "sampling/logit_scan.h"

namespace partita {

extern const LogitScan kLogitScanPortable, kLogitScanAvx2, kLogitScanAvx512;

}  // namespace partita
