// The walk over one work item, the same on every instruction set: splits -> tiles -> row blocks, and how partial
// softmaxes are merged. Included by one translation unit per instruction set, which supplies `Isa`, the tile
// arithmetic:
//
//   Isa::kRowBlock                        query rows that share a pass over a tile
//   Isa::kAsksAhead                       whether a tile is fetched so fast that memory should be asked for the next
//   Isa::turns_per_tile(task)             how often the loops over a tile of one row block move s.ahead on
//   Isa::pack_queries(task, s)            q -> the form that scores() reads
//   Isa::load_tile(task, s, groups, n)    K and V of n 16-token groups -> scratch
//   Isa::attend_block(task, s, row, num_rows, lows, highs, is_masked)
//                                         scores, online softmax and P V of rows [row, row + num_rows) against the tile
//   Isa::write_row(task, o, f, out)       out = o * f, elements in order
//   Isa::rotate(x, D)                     undoes the rotation of V
//   Isa::keeps_codes(task, stream)        whether the stream's codes are dotted as integers
//
// Invariants that make a token's result independent of what it is computed with: a row's arithmetic never reads another
// row; tiles and splits lie at absolute positions; a tile that a row cannot see changes nothing of that row, bit for
// bit (p = 0, alpha = 1); K is summed over d, and V over tokens, in ascending order.

#include <cstring>

#include "attention/cpu/attend_kernel.h"
#include "attention/cpu/kv_ahead.h"

namespace partita {
namespace {

constexpr int kMaxRowBlock = 6;
constexpr int kGroupTokens = 16;
constexpr int kTileGroups = kKvTileTokens / kGroupTokens;
constexpr int kStateLanes = 16;
// Below every score: the running maximum of a row that has seen nothing yet.
constexpr float kNoScore = -1e30f;
constexpr float kLog2E = 1.4426950408889634f;

// 2^f = 1 + f c1 + ... f^5 c5 on [-0.5, 0.5], relative error 9e-8 (fitted for this project, Lawson iteration).
constexpr float kExp2C1 = 0.6931470036506653f;
constexpr float kExp2C2 = 0.24022242426872253f;
constexpr float kExp2C3 = 0.05550733581185341f;
constexpr float kExp2C4 = 0.009671512991189957f;
constexpr float kExp2C5 = 0.001326472731307149f;
constexpr float kExp2Rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
constexpr float kExp2Lowest = -100.0f;       // 2^-100 stands for everything below; keeps denormals away

inline float exp2_one(float x) {
  x = x > kExp2Lowest ? x : kExp2Lowest;
  const float shifted = x + kExp2Rounder;
  const float f = x - (shifted - kExp2Rounder);
  const float poly = ((((kExp2C5 * f + kExp2C4) * f + kExp2C3) * f + kExp2C2) * f + kExp2C1) * f + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&bits, &poly, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Where 16 consecutive tokens of K and V lie.
struct TokenGroup {
  const std::byte* k;
  const uint16_t* k_params;
  const std::byte* v;
  const uint16_t* v_params;
};

// One worker's memory for one item.
struct Scratch {
  float* q;                  // [rows, D] scaled queries (fp32 arithmetic)
  int8_t* q_high;            // [rows, D] 16-bit queries as 256 * high + low (integer dot)
  int8_t* q_low;             // [rows, D]
  float* q_scale;            // [rows]
  float* q_sum;              // [rows] sum of the dequantised query
  float* k;                  // [D, 64] fp32, or [D / 4, 64] groups of four codes
  float* v;                  // [64, pitch] fp32, or [16, pitch] groups of four tokens' codes
  float* k_scale;            // [64]
  float* k_min;              // [64]
  float* v_scale;            // [64]
  float* v_min;              // [64]
  float* scores;             // [kMaxRowBlock, 64] in units of log2
  float* p;                  // [kMaxRowBlock, 64]
  int8_t* p_high;            // [kMaxRowBlock, 64]
  int8_t* p_low;             // [kMaxRowBlock, 64]
  float* p_scale;            // [kMaxRowBlock]
  float* alpha;              // [kMaxRowBlock]
  float* m;                  // [rows] running maximum of the split
  float* l;                  // [rows, 16] running sum, by lane; [rows] once the split is closed
  float* l_min;              // [rows, 16] sum of p * v_min, by lane
  float* o;                  // [rows, pitch]
  float* total_m;            // [rows] all splits so far
  float* total_l;            // [rows]
  float* total_o;            // [rows, pitch]
  float* decoded;            // [16, 256]
  const TokenGroup* groups;  // of the tile in hand
  const std::byte** lines;   // listed_lines(D), to be asked for
  LinesAhead* ahead;
  std::byte* k_tail;  // copies of the last group's rows, zero past the last visible token
  std::byte* v_tail;
  uint16_t* k_tail_params;  // [16, 2]
  uint16_t* v_tail_params;
};

class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(size_t count) {
    std::byte* at = base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

size_t carve_scratch(int rows, int head_dim, std::byte* base, Scratch* s) {
  const int pitch = partial_pitch(head_dim);
  Carver carver(base);
  s->q = carver.take<float>(static_cast<size_t>(rows) * head_dim);
  s->q_high = carver.take<int8_t>(static_cast<size_t>(rows) * head_dim);
  s->q_low = carver.take<int8_t>(static_cast<size_t>(rows) * head_dim);
  s->q_scale = carver.take<float>(rows);
  s->q_sum = carver.take<float>(rows);
  s->k = carver.take<float>(static_cast<size_t>(head_dim + 64) * kKvTileTokens);
  s->v = carver.take<float>(static_cast<size_t>(pitch) * kKvTileTokens);
  s->k_scale = carver.take<float>(kKvTileTokens);
  s->k_min = carver.take<float>(kKvTileTokens);
  s->v_scale = carver.take<float>(kKvTileTokens);
  s->v_min = carver.take<float>(kKvTileTokens);
  s->scores = carver.take<float>(kMaxRowBlock * kKvTileTokens);
  s->p = carver.take<float>(kMaxRowBlock * kKvTileTokens);
  s->p_high = carver.take<int8_t>(kMaxRowBlock * kKvTileTokens);
  s->p_low = carver.take<int8_t>(kMaxRowBlock * kKvTileTokens);
  s->p_scale = carver.take<float>(kMaxRowBlock);
  s->alpha = carver.take<float>(kMaxRowBlock);
  s->m = carver.take<float>(rows);
  s->l = carver.take<float>(static_cast<size_t>(rows) * kStateLanes);
  s->l_min = carver.take<float>(static_cast<size_t>(rows) * kStateLanes);
  s->o = carver.take<float>(static_cast<size_t>(rows) * pitch);
  s->total_m = carver.take<float>(rows);
  s->total_l = carver.take<float>(rows);
  s->total_o = carver.take<float>(static_cast<size_t>(rows) * pitch);
  s->decoded = carver.take<float>(kGroupTokens * 256);
  s->lines = carver.take<const std::byte*>(listed_lines(head_dim));
  s->groups = nullptr;
  s->ahead = nullptr;
  s->k_tail = carver.take<std::byte>(kGroupTokens * 256 * sizeof(float) + 64);
  s->v_tail = carver.take<std::byte>(kGroupTokens * 256 * sizeof(float) + 64);
  s->k_tail_params = carver.take<uint16_t>(kGroupTokens * 2);
  s->v_tail_params = carver.take<uint16_t>(kGroupTokens * 2);
  return carver.used();
}

size_t attend_scratch_bytes(int max_rows, int head_dim) {
  Scratch s;
  return carve_scratch(max_rows, head_dim, nullptr, &s);
}

// A group whose last tokens nobody here sees is copied, and zero past them: what lies in unwritten slots (NaN perhaps)
// is never read.
void copy_tail(const KvStream& stream, int num_tokens, const std::byte* codes, const uint16_t* params, std::byte* tail,
               uint16_t* tail_params) {
  const size_t bytes = stream.row_bytes * num_tokens;
  std::memcpy(tail, codes, bytes);
  std::memset(tail + bytes, 0, stream.row_bytes * kGroupTokens - bytes);
  if (!params) return;
  std::memcpy(tail_params, params, sizeof(uint16_t) * 2 * num_tokens);
  std::memset(tail_params + 2 * num_tokens, 0, sizeof(uint16_t) * 2 * (kGroupTokens - num_tokens));
}

// Fills groups[] with the tile at absolute position `tile_start`, of which num_tokens are visible to someone.
int locate_tile(const AttendTask& task, const Scratch& s, int64_t tile_start, int num_tokens, TokenGroup* groups) {
  const int num_groups = (num_tokens + kGroupTokens - 1) / kGroupTokens;
  for (int g = 0; g < num_groups; ++g) {
    size_t slot;
    const std::byte* page = page_of(task, tile_start + g * kGroupTokens, &slot);
    TokenGroup& group = groups[g];
    group.k = page + task.k.codes_offset + slot * task.k.row_bytes;
    group.v = page + task.v.codes_offset + slot * task.v.row_bytes;
    group.k_params =
        has_params(task.k.codec) ? reinterpret_cast<const uint16_t*>(page + task.k.params_offset) + 2 * slot : nullptr;
    group.v_params =
        has_params(task.v.codec) ? reinterpret_cast<const uint16_t*>(page + task.v.params_offset) + 2 * slot : nullptr;
    const int visible = num_tokens - g * kGroupTokens;
    if (visible < kGroupTokens) {
      copy_tail(task.k, visible, group.k, group.k_params, s.k_tail, s.k_tail_params);
      copy_tail(task.v, visible, group.v, group.v_params, s.v_tail, s.v_tail_params);
      group = {s.k_tail, group.k_params ? s.k_tail_params : nullptr, s.v_tail,
               group.v_params ? s.v_tail_params : nullptr};
    }
  }
  return num_groups;
}

void open_split(const AttendTask& task, const Scratch& s) {
  const size_t rows = task.num_rows;
  for (size_t r = 0; r < rows; ++r) s.m[r] = kNoScore;
  std::memset(s.l, 0, sizeof(float) * rows * kStateLanes);
  std::memset(s.l_min, 0, sizeof(float) * rows * kStateLanes);
  std::memset(s.o, 0, sizeof(float) * rows * partial_pitch(task.head_dim));
}

inline float sum_lanes(const float* lanes) {
  float sums[kStateLanes];
  std::memcpy(sums, lanes, sizeof sums);
  for (int h = kStateLanes / 2; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) sums[i] += sums[i + h];
  return sums[0];
}

// Sums the lanes of l into l[row] and adds the integer codec's minimum to every column of o.
void close_split(const AttendTask& task, const Scratch& s, bool has_min) {
  const int pitch = partial_pitch(task.head_dim);
  for (int r = 0; r < task.num_rows; ++r) {
    s.l[r] = sum_lanes(s.l + static_cast<size_t>(r) * kStateLanes);
    if (!has_min) continue;
    const float offset = sum_lanes(s.l_min + static_cast<size_t>(r) * kStateLanes);
    float* o = s.o + static_cast<size_t>(r) * pitch;
    for (int c = 0; c < pitch; ++c) o[c] += offset;
  }
}

// total <- total (+) one split's partial softmax; the first split is the total as it is. The only place where splits
// meet, so that one worker walking all of them and many workers leaving partials give the same bits.
void merge_split(const AttendTask& task, const Scratch& s, const float* m, const float* l, const float* o) {
  const int pitch = partial_pitch(task.head_dim);
  for (int r = 0; r < task.num_rows; ++r) {
    const float m_new = s.total_m[r] > m[r] ? s.total_m[r] : m[r];
    const float old_weight = exp2_one(s.total_m[r] - m_new);
    const float weight = exp2_one(m[r] - m_new);
    s.total_m[r] = m_new;
    s.total_l[r] = s.total_l[r] * old_weight + l[r] * weight;
    float* total = s.total_o + static_cast<size_t>(r) * pitch;
    const float* part = o + static_cast<size_t>(r) * pitch;
    for (int c = 0; c < pitch; ++c) total[c] = total[c] * old_weight + part[c] * weight;
  }
}

void store_partial(const AttendTask& task, const Scratch& s, float* partial) {
  const size_t rows = task.num_rows;
  std::memcpy(partial, s.m, sizeof(float) * rows);
  std::memcpy(partial + rows, s.l, sizeof(float) * rows);
  std::memcpy(partial + 2 * rows, s.o, sizeof(float) * rows * partial_pitch(task.head_dim));
}

// out = o / l, elements back in order, rotated back where V lies rotated.
template <class Isa>
void write_out(const AttendTask& task, const float* l, const float* o) {
  const int head_dim = task.head_dim;
  for (int r = 0; r < task.num_rows; ++r, o += partial_pitch(head_dim)) {
    float* out = task.out + (r / task.group) * task.out_stride + static_cast<int64_t>(r % task.group) * head_dim;
    Isa::write_row(task, o, 1.0f / l[r], out);
    if (task.v.codec == KvCodec::kInt4Rotated) Isa::rotate(out, head_dim);
  }
}

// Row r of a block sees the tile's tokens [lows[r], highs[r]). Returns whether any row sees any.
inline bool see_tile(const AttendTask& task, int64_t tile_start, int row, int num_rows, int* lows, int* highs,
                     bool* is_masked) {
  *is_masked = false;
  bool is_seen = false;
  for (int r = 0; r < num_rows; ++r) {
    const int64_t position = task.first_position + (row + r) / task.group;
    const int64_t high = position + 1 - tile_start;
    const int64_t low = task.window > 0 ? high - task.window : 0;
    highs[r] = static_cast<int>(high < 0 ? 0 : (high < kKvTileTokens ? high : kKvTileTokens));
    lows[r] = static_cast<int>(low < 0 ? 0 : (low < kKvTileTokens ? low : kKvTileTokens));
    *is_masked |= lows[r] > 0 || highs[r] < kKvTileTokens;
    is_seen |= lows[r] < highs[r];
  }
  return is_seen;
}

// next: what this worker will probably run afterwards (the same layer), or null; only its first tile is asked for.
template <class Isa>
void attend_task(const AttendTask& task, const AttendTask* next, std::byte* scratch) {
  Scratch s;
  carve_scratch(task.num_rows, task.head_dim, scratch, &s);
  Isa::pack_queries(task, s);
  const int64_t begin = walk_begin(task), end = walk_end(task);
  const bool has_min = Isa::keeps_codes(task, task.v);
  const int num_blocks = (task.num_rows + Isa::kRowBlock - 1) / Isa::kRowBlock;
  // Each tile asks for one tile: in the turns of its loops, or, where there is time between row blocks, there.
  const int asked_in = num_blocks > 1 ? num_blocks : Isa::turns_per_tile(task);
  const int asked_at_once = (tile_lines(task) + asked_in - 1) / asked_in;
  LinesAhead ahead(task, next, asked_at_once, s.lines);
  s.ahead = &ahead;

  for (int split = task.split_begin; split < task.split_end; ++split) {
    open_split(task, s);
    const int64_t split_start = int64_t{split} * kKvSplitTokens;
    const int64_t split_end = split_start + kKvSplitTokens < end ? split_start + kKvSplitTokens : end;
    int64_t tile_start = split_start > begin ? split_start : begin;
    for (; tile_start < split_end; tile_start += kKvTileTokens) {
      TokenGroup groups[kTileGroups];
      s.groups = groups;
      const int64_t left = split_end - tile_start;
      const int num_visible = static_cast<int>(left < kKvTileTokens ? left : kKvTileTokens);
      const int num_groups = locate_tile(task, s, tile_start, num_visible, groups);
      if (Isa::kAsksAhead) ahead.list(tile_lines(task));
      Isa::load_tile(task, s, groups, num_groups);
      for (int block = 0; block < num_blocks; ++block) {
        const int row = block * Isa::kRowBlock;
        const int block_rows = task.num_rows - row < Isa::kRowBlock ? task.num_rows - row : Isa::kRowBlock;
        if (Isa::kAsksAhead && num_blocks > 1) ahead.ask(asked_at_once);
        int lows[kMaxRowBlock], highs[kMaxRowBlock];
        bool is_masked;
        if (see_tile(task, tile_start, row, block_rows, lows, highs, &is_masked))
          Isa::attend_block(task, s, row, block_rows, num_groups, lows, highs, is_masked);
      }
    }
    close_split(task, s, has_min);
    if (task.partials) {
      store_partial(task, s, task.partials + partial_floats(task.num_rows, task.head_dim) * (split - task.split_begin));
    } else if (split == task.split_begin) {
      std::memcpy(s.total_m, s.m, sizeof(float) * task.num_rows);
      std::memcpy(s.total_l, s.l, sizeof(float) * task.num_rows);
      float* first = s.o;
      s.o = s.total_o;
      s.total_o = first;
    } else {
      merge_split(task, s, s.m, s.l, s.o);
    }
  }
  if (!task.partials) write_out<Isa>(task, s.total_l, s.total_o);
}

template <class Isa>
void merge_task(const AttendTask& task, const float* partials, int num_partials, std::byte* scratch) {
  Scratch s;
  carve_scratch(task.num_rows, task.head_dim, scratch, &s);
  const size_t rows = task.num_rows;
  for (int i = 0; i < num_partials; ++i, partials += partial_floats(task.num_rows, task.head_dim)) {
    const float *m = partials, *l = partials + rows, *o = partials + 2 * rows;
    if (i > 0) {
      merge_split(task, s, m, l, o);
      continue;
    }
    std::memcpy(s.total_m, m, sizeof(float) * rows);
    std::memcpy(s.total_l, l, sizeof(float) * rows);
    std::memcpy(s.total_o, o, sizeof(float) * rows * partial_pitch(task.head_dim));
  }
  write_out<Isa>(task, s.total_l, s.total_o);
}

}  // namespace
}  // namespace partita
