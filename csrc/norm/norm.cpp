#include "norm/norm.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "norm/rms_norm_row.h"

namespace partita {
namespace {

// About 8k floats a chunk: large enough that claiming it costs nothing beside it, small enough to spread a prefill.
int64_t rows_per_chunk(int64_t hidden) { return std::max<int64_t>(1, 8192 / hidden); }

}  // namespace

void norm_check(const RmsNormParams& params) {
  PARTITA_CHECK(params.num_tokens >= 0, "num_tokens: got ", params.num_tokens, ", wanted at least 0");
  PARTITA_CHECK(params.hidden > 0, "hidden: got ", params.hidden, ", wanted at least 1");
  PARTITA_CHECK(std::isfinite(params.eps) && params.eps >= 0, "eps: got ", params.eps,
                ", wanted a finite number of at least 0");
  if (params.num_tokens == 0) return;
  PARTITA_CHECK(params.in && params.weight && params.out, "in, weight, out: got a null pointer");
  PARTITA_CHECK(params.in_stride >= params.hidden || params.num_tokens == 1, "in_stride: got ", params.in_stride,
                ", wanted at least hidden = ", params.hidden);
  PARTITA_CHECK(params.out_stride >= params.hidden || params.num_tokens == 1, "out_stride: got ", params.out_stride,
                ", wanted at least hidden = ", params.hidden);
  PARTITA_CHECK(!params.add_to_out || params.in != params.out, "out: is `in`, wanted another array with add_to_out");
}

int64_t norm_num_chunks(const RmsNormParams& params) {
  const int64_t rows = rows_per_chunk(params.hidden);
  return (params.num_tokens + rows - 1) / rows;
}

void norm_run_chunk(const RmsNormParams& params, int64_t chunk) {
  const int64_t rows = rows_per_chunk(params.hidden);
  const int64_t end = std::min(params.num_tokens, (chunk + 1) * rows);
  for (int64_t t = chunk * rows; t < end; ++t) {
    const float* in = params.in + t * params.in_stride;
    float* out = params.out + t * params.out_stride;
    if (params.add_to_out)
      rms_norm_add_row(in, params.weight, params.eps, params.hidden, out);
    else
      rms_norm_row(in, params.weight, params.eps, params.hidden, out);
  }
}

}  // namespace partita
