// Canonical weights side by side: segments of a fused linear as one matrix, rows in another order.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm/canonical_weight.h"

namespace partita {

// Whether rows of both can lie in one packed matrix: equal codes, groups, kind of zero or min, input order.
bool is_same_kind(const CanonicalWeight& a, const CanonicalWeight& b);

// Rows of all, which are of the same kind.
CanonicalWeight concatenated(const std::vector<const CanonicalWeight*>& segments);

// Row rows[i] of `weight` as row i; -1: a row of zeros.
CanonicalWeight rows_of(const CanonicalWeight& weight, const std::vector<int64_t>& rows);

// Rows by eight: eight of the first half, eight of the second, and so on; the last eight filled with zeros.
CanonicalWeight gate_interleaved(const CanonicalWeight& weight);

// The same values in one kind that holds all segments: u8 codes in the smallest group, with mins where zeros differ
// (scale * zero is then rounded to fp32); anything that integers do not hold becomes fp32.
std::vector<CanonicalWeight> unified(const std::vector<CanonicalWeight>& segments);

}  // namespace partita
