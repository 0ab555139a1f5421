// Tile arithmetic in fp32, for any vector width: the exact mode everywhere, and every mode without AVX-512. The
// including file defines, in an anonymous namespace of partita:
//   Vec                    a GCC vector of kLanes floats; Int its integer twin
//   kLanes, kVecBlock      lanes, and vectors of tokens or columns that a register block spans
//   kRows                  query rows of a register block, at most kMaxRowBlock
//   fused(a, b, c)         a * b + c, rounded once where the machine has it
//   row_kernel()           the KvRowKernel of this instruction set

#include "attention/cpu/attend_flow.h"

namespace partita {
namespace {

inline Vec load(const float* at) {
  Vec x;
  std::memcpy(&x, at, sizeof x);
  return x;
}
inline void store(float* at, Vec x) { std::memcpy(at, &x, sizeof x); }
inline Vec broadcast(float x) { return x - Vec{}; }  // x - 0 is x, -0 included
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Int lane_indices() {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Vec exp2_lanes(Vec x) {
  x = larger(x, broadcast(kExp2Lowest));
  const Vec shifted = x + broadcast(kExp2Rounder);
  const Vec f = x - (shifted - broadcast(kExp2Rounder));
  Vec poly = fused(broadcast(kExp2C5), f, broadcast(kExp2C4));
  poly = fused(poly, f, broadcast(kExp2C3));
  poly = fused(poly, f, broadcast(kExp2C2));
  poly = fused(poly, f, broadcast(kExp2C1));
  poly = fused(poly, f, broadcast(1.0f));
  return (Vec)((Int)poly + ((Int)shifted << 23));
}

// tanh(x) = 1 - 2 / (2^(2 x log2 e) + 1)
inline Vec tanh_lanes(Vec x) {
  Vec y = x * broadcast(2.0f * kLog2E);
  const Vec limit = broadcast(64.0f);
  y = y > limit ? limit : y;
  return broadcast(1.0f) - broadcast(2.0f) / (exp2_lanes(y) + broadcast(1.0f));
}

struct Fp32Tile {
  static constexpr int kRowBlock = kRows;

  static bool keeps_codes(const AttendTask&, const KvStream&) { return false; }

  static constexpr bool kAsksAhead = false;  // decoding a tile into fp32 takes longer than fetching it
  static int turns_per_tile(const AttendTask&) { return 1; }

  static void rotate(float* x, int head_dim) { row_kernel().rotate(x, head_dim, rotation_size(head_dim)); }

  static int rotation_size(int head_dim) {
    int size = 1;
    while (size < 256 && head_dim % (size * 2) == 0) size *= 2;
    return size;
  }

  static void write_row(const AttendTask& task, const float* o, float factor, float* out) {
    for (int d = 0; d < task.head_dim; ++d) out[d] = (o[d] + 0.0f) * factor;  // as merging leaves it: no -0
  }

  // Scores come out in units of log2, or of the cap where there is one.
  static float query_factor(const AttendTask& task) {
    return task.soft_cap > 0 ? task.scale / task.soft_cap : task.scale * kLog2E;
  }

  static void pack_queries(const AttendTask& task, const Scratch& s) {
    const float factor = query_factor(task);
    for (int r = 0; r < task.num_rows; ++r) {
      const float* q = task.q + (r / task.group) * task.q_stride + static_cast<int64_t>(r % task.group) * task.head_dim;
      for (int d = 0; d < task.head_dim; ++d) s.q[static_cast<size_t>(r) * task.head_dim + d] = q[d] * factor;
    }
  }

  // K transposed to [D, 64], V as it lies, [64, pitch].
  static void load_tile(const AttendTask& task, const Scratch& s, const TokenGroup* groups, int num_groups) {
    const int head_dim = task.head_dim;
    const int pitch = partial_pitch(head_dim);
    const auto decode = row_kernel().decode;
    for (int g = 0; g < num_groups; ++g) {
      const TokenGroup& group = groups[g];
      for (int t = 0; t < kGroupTokens; ++t)
        decode(task.k.codec, group.k + t * task.k.row_bytes, group.k_params ? group.k_params + 2 * t : nullptr,
               head_dim, s.decoded + t * 256);
      for (int d = 0; d < head_dim; ++d)
        for (int t = 0; t < kGroupTokens; ++t) s.k[d * kKvTileTokens + g * kGroupTokens + t] = s.decoded[t * 256 + d];
      for (int t = 0; t < kGroupTokens; ++t) {
        float* v = s.v + static_cast<size_t>(g * kGroupTokens + t) * pitch;
        decode(task.v.codec, group.v + t * task.v.row_bytes, group.v_params ? group.v_params + 2 * t : nullptr,
               head_dim, v);
        std::memset(v + head_dim, 0, sizeof(float) * (pitch - head_dim));
      }
    }
  }

  template <int R>
  static void score_rows(const Scratch& s, int head_dim, const float* q) {
    for (int token = 0; token < kKvTileTokens; token += kLanes * kVecBlock) {
      Vec acc[R][kVecBlock];
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kVecBlock; ++n) acc[r][n] = Vec{};
      const float* k = s.k + token;
      for (int d = 0; d < head_dim; ++d, k += kKvTileTokens) {
        Vec keys[kVecBlock];
        for (int n = 0; n < kVecBlock; ++n) keys[n] = load(k + n * kLanes);
        for (int r = 0; r < R; ++r) {
          const Vec query = broadcast(q[r * head_dim + d]);
          for (int n = 0; n < kVecBlock; ++n) acc[r][n] = fused(query, keys[n], acc[r][n]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kVecBlock; ++n) store(s.scores + r * kKvTileTokens + token + n * kLanes, acc[r][n]);
    }
  }

  // scores -> p, alpha; updates m and l of the row.
  static void softmax_row(const AttendTask& task, const Scratch& s, int row, int r, int low, int high, bool is_masked) {
    constexpr int kVecs = kKvTileTokens / kLanes;
    Vec x[kVecs];
    const Vec nothing = broadcast(kNoScore);
    Vec top = nothing;
    for (int i = 0; i < kVecs; ++i) {
      x[i] = load(s.scores + r * kKvTileTokens + i * kLanes);
      if (task.soft_cap > 0) x[i] = tanh_lanes(x[i]) * broadcast(task.soft_cap * kLog2E);
      if (is_masked) {
        const Int token = lane_indices() + i * kLanes;
        x[i] = (token >= low) & (token < high) ? x[i] : nothing;
      }
      top = larger(x[i], top);
    }
    float tile_max = s.m[row];
    for (int i = 0; i < kLanes; ++i) tile_max = top[i] > tile_max ? top[i] : tile_max;
    const Vec m_new = broadcast(tile_max);
    const Vec alpha = exp2_lanes(broadcast(s.m[row]) - m_new);
    float* l = s.l + static_cast<size_t>(row) * kStateLanes;
    s.m[row] = tile_max;
    s.alpha[r] = alpha[0];
    for (int i = 0; i < kStateLanes / kLanes; ++i) store(l + i * kLanes, load(l + i * kLanes) * alpha);
    for (int i = 0; i < kVecs; ++i) {
      Vec p = exp2_lanes(x[i] - m_new);
      if (is_masked) {
        const Int token = lane_indices() + i * kLanes;
        p = (token >= low) & (token < high) ? p : Vec{};
      }
      store(s.p + r * kKvTileTokens + i * kLanes, p);
      float* lane = l + i * kLanes % kStateLanes;
      store(lane, load(lane) + p);
    }
  }

  template <int R, int N>
  static void accumulate_columns(const Scratch& s, int row, int column, int pitch, int num_tokens) {
    float* o = s.o + static_cast<size_t>(row) * pitch + column;
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] = load(o + static_cast<size_t>(r) * pitch + n * kLanes) * broadcast(s.alpha[r]);
    const float* v = s.v + column;
    for (int t = 0; t < num_tokens; ++t, v += pitch) {
      Vec values[N];
      for (int n = 0; n < N; ++n) values[n] = load(v + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec p = broadcast(s.p[r * kKvTileTokens + t]);
        for (int n = 0; n < N; ++n) acc[r][n] = fused(p, values[n], acc[r][n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(o + static_cast<size_t>(r) * pitch + n * kLanes, acc[r][n]);
  }

  template <int R>
  static void accumulate_rows(const Scratch& s, int row, int head_dim, int num_tokens) {
    const int pitch = partial_pitch(head_dim);
    int column = 0;
    for (; column + kLanes * kVecBlock <= head_dim; column += kLanes * kVecBlock)
      accumulate_columns<R, kVecBlock>(s, row, column, pitch, num_tokens);
    for (; column < head_dim; column += kLanes) accumulate_columns<R, 1>(s, row, column, pitch, num_tokens);
  }

  template <int R>
  static void attend_rows(const AttendTask& task, const Scratch& s, int row, int num_groups, const int* lows,
                          const int* highs, bool is_masked) {
    score_rows<R>(s, task.head_dim, s.q + static_cast<size_t>(row) * task.head_dim);
    for (int r = 0; r < R; ++r) softmax_row(task, s, row + r, r, lows[r], highs[r], is_masked);
    accumulate_rows<R>(s, row, task.head_dim, num_groups * kGroupTokens);
  }

  static void attend_block(const AttendTask& task, const Scratch& s, int row, int num_rows, int num_groups,
                           const int* lows, const int* highs, bool is_masked) {
    static_assert(kRows <= 4, "one case per row count");
    switch (num_rows) {
      case 1:
        return attend_rows<1>(task, s, row, num_groups, lows, highs, is_masked);
      case 2:
        return attend_rows<2>(task, s, row, num_groups, lows, highs, is_masked);
      case 3:
        return attend_rows<3>(task, s, row, num_groups, lows, highs, is_masked);
      default:
        return attend_rows<4>(task, s, row, num_groups, lows, highs, is_masked);
    }
  }
};

constexpr AttendKernel kFp32Kernel{attend_scratch_bytes, attend_task<Fp32Tile>, merge_task<Fp32Tile>};

}  // namespace
}  // namespace partita
