// Asking for packed tiles that R streams (tiles side by side) will read next. Included by the AVX-512 kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace partita {
namespace {

// Into L2, over all streams together. On one core, one token and weights of 190 MB: 5 KB into L1 10 to 12 GB/s, 24 KB
// into L2 12 to 14; eight tokens 9 and 12 (README).
constexpr int64_t kPrefetchBytes = 24 * 1024;

template <int R>
class TilesAhead {
 public:
  // end: behind it lies another worker's run; prefetched here it would cross the memory bus twice.
  TilesAhead(const std::byte* tiles, int64_t tile_bytes, const std::byte* end)
      : tiles_(tiles), end_(end), tile_bytes_(tile_bytes), offset_(kPrefetchBytes / R) {
    skip_full_tiles();
  }

  // The next kLines lines of each stream.
  template <int kLines>
  void advance() {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const std::byte* line = tiles_ + r * tile_bytes_ + offset_;
      if (line + kLines * 64 > end_) continue;
#pragma GCC unroll 9
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + i * 64, 0, 2);
    }
    offset_ += kLines * 64;
    skip_full_tiles();
  }

 private:
  void skip_full_tiles() {
    for (; offset_ >= tile_bytes_; offset_ -= tile_bytes_) tiles_ += R * tile_bytes_;
  }

  const std::byte* tiles_;
  const std::byte* end_;
  int64_t tile_bytes_;
  int64_t offset_;  // within the tile of each stream
};

// Where many tokens share unpacked tiles: the next ones a few lines at a time, num_steps times.
class LinesToCome {
 public:
  LinesToCome(const std::byte* begin, int64_t num_bytes, const std::byte* end, int64_t num_steps)
      : begin_(begin), num_steps_(num_steps) {
    const int64_t left = end > begin ? end - begin : 0;
    num_lines_ = (left < num_bytes ? left : num_bytes) / 64;
  }
  void step() {
    for (const int64_t stop = num_lines_ * ++steps_ / num_steps_; line_ < stop; ++line_)
      __builtin_prefetch(begin_ + line_ * 64, 0, 2);
  }

 private:
  const std::byte* begin_;
  int64_t num_steps_, num_lines_, line_ = 0, steps_ = 0;
};

}  // namespace
}  // namespace partita
