// A packed linear layer: its segments' tiles, and how a run over them is cut into chunks.
//
// A chunk is (token block, row range). Rows first inside a token block, so that the block's activations stay in
// cache while the weights stream past. With few tokens a chunk is some 24 KB of packed weights, and a worker streams
// through a run of neighbouring ones; with many, it is two tiles by up to 96 tokens.
#include <algorithm>
#include <cstring>

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "core/parallel_for.h"
#include "gemm/gemm.h"
#include "gemm/kernels.h"
#include "gemm/packed_memory.h"
#include "gemm/packed_tile.h"
#include "gemm/select.h"

namespace partita {
namespace {

constexpr int64_t kDecodeChunkBytes = 24 * 1024;
constexpr int64_t kMinChunks = 16;  // wanted, so that a few workers end together
constexpr int64_t kPrefillChunkTiles = 2;
constexpr int64_t kFirstPrefetchBytes = 8 * 1024;  // of each stream of a chunk

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Segment {
  TileLayout layout;
  int64_t first_row = 0;  // of the linear's outputs
  int64_t num_rows = 0;
  const std::byte* tiles = nullptr;
};

// Output rows [begin, end) that lie in one segment (gated: in one gate and one up segment).
struct Piece {
  int64_t begin = 0;
  int64_t end = 0;
  int segment = 0;
  int up_segment = 0;
};

class TiledLinear final : public PackedLinear {
 public:
  TiledLinear(const std::vector<Weight>& weights, ActivationType activations, int num_threads);

  size_t packed_bytes() const override { return packed_bytes_; }
  size_t prepared_row_bytes() const override { return row_bytes_; }
  void prepare_row(const float* x, const float* norm_weight, float norm_eps, std::byte* prepared) const override {
    kernels_->prepare_row(x, norm_weight, norm_eps, in_features, prepared);
  }
  int64_t num_chunks(int64_t num_tokens, bool gated) const override;
  size_t scratch_bytes(int64_t num_tokens, bool gated) const override;
  void run_chunk(const std::byte* prepared, int64_t num_tokens, const LinearEpilogue& epilogue, int64_t chunk,
                 int64_t run_end, std::byte* scratch) const override;
  void prefetch_chunk(int64_t num_tokens, bool gated, int64_t chunk) const override;

 private:
  // How a run is cut.
  struct Cut {
    int64_t token_block;
    int64_t chunk_rows;  // a multiple of kTileRows
    int64_t row_chunks;
  };
  // What one chunk computes.
  struct Region {
    int64_t first_token, num_tokens;
    int64_t begin, end;  // output rows
    int64_t run_end;     // output rows of the chunks that the caller runs next
    const Piece* piece;
  };
  Region region(const Cut& cut, int64_t num_tokens, bool gated, int64_t chunk, int64_t run_end) const;
  const std::vector<Piece>& pieces(bool gated) const { return gated ? gated_pieces_ : pieces_; }
  Cut cut(int64_t num_tokens, bool gated) const;
  Cut cut_anew(int64_t num_tokens, bool gated) const;
  void cut_gated_pieces();
  int segment_of(int64_t row) const;
  // Sums of the tiles that cover rows [begin, end); returns where row `begin` lies in them.
  const float* multiply(int segment, int64_t begin, int64_t end, int64_t run_end, const std::byte* prepared,
                        int64_t num_tokens, float* sums, int64_t sums_stride, std::byte* scratch) const;

  const TileKernels* kernels_;
  int64_t row_bytes_;
  std::shared_ptr<std::byte> packed_;
  size_t packed_bytes_ = 0;
  std::vector<Segment> segments_;
  std::vector<Piece> pieces_, gated_pieces_;
  Cut decode_cut_{}, gated_decode_cut_{};  // of any number of tokens that is read in one pass
  int64_t total_tiles_ = 0;
};

TiledLinear::TiledLinear(const std::vector<Weight>& weights, ActivationType activations, int num_threads) {
  KernelChoice choice = select_gemm_kernels(weights, activations);
  kernels_ = choice.kernels;
  kernel = std::move(choice.name);
  reason = std::move(choice.reason);
  activation_type = kernels_->activation_type;
  in_features = weights[0].in_features;
  row_bytes_ = partita::prepared_row_bytes(activation_type, in_features);

  int64_t total_bytes = 0;
  std::vector<int64_t> offsets;
  for (const Weight& weight : weights) {
    Segment segment;
    segment.layout =
        tile_layout(activation_type == ActivationType::kBF16 ? WeightFormat::kBF16 : weight.format, in_features);
    segment.first_row = out_features;
    segment.num_rows = weight.out_features;
    out_features += weight.out_features;
    pieces_.push_back({segment.first_row, out_features, static_cast<int>(segments_.size()), 0});
    offsets.push_back(total_bytes);
    const int64_t num_tiles = ceil_div(segment.num_rows, kTileRows);
    total_tiles_ += num_tiles;
    total_bytes += num_tiles * segment.layout.tile_bytes;
    segments_.push_back(segment);
  }
  if (out_features % 2 == 0) cut_gated_pieces();
  packed_bytes_ = total_bytes;
  decode_cut_ = cut_anew(1, false);
  if (out_features % 2 == 0) gated_decode_cut_ = cut_anew(1, true);
  packed_ = allocate_packed_memory(packed_bytes_);

  // One job is a run of tiles of one segment, about 256 KB of them.
  struct Job {
    int segment;
    int64_t first_tile, end_tile;
  };
  std::vector<Job> jobs;
  for (size_t s = 0; s < segments_.size(); ++s) {
    segments_[s].tiles = packed_.get() + offsets[s];
    const int64_t num_tiles = ceil_div(segments_[s].num_rows, kTileRows);
    const int64_t step = std::max<int64_t>(1, (256 << 10) / segments_[s].layout.tile_bytes);
    for (int64_t tile = 0; tile < num_tiles; tile += step)
      jobs.push_back({static_cast<int>(s), tile, std::min(num_tiles, tile + step)});
  }
  parallel_for(static_cast<int64_t>(jobs.size()), num_threads, [&](int64_t job_idx, int) {
    const Job& job = jobs[job_idx];
    const TileLayout& layout = segments_[job.segment].layout;
    const AlignedBuffer workspace(kTileRows * in_features * sizeof(float));
    for (int64_t tile = job.first_tile; tile < job.end_tile; ++tile)
      pack_tile(weights[job.segment], layout, tile * kTileRows, workspace.data(),
                packed_.get() + offsets[job.segment] + tile * layout.tile_bytes);
  });
}

int TiledLinear::segment_of(int64_t row) const {
  int index = 0;
  while (row >= segments_[index].first_row + segments_[index].num_rows) ++index;
  return index;
}

// Cuts one half's rows wherever the gate or the up half enters another segment.
void TiledLinear::cut_gated_pieces() {
  const int64_t half = out_features / 2;
  for (int64_t begin = 0; begin < half;) {
    const int gate = segment_of(begin), up = segment_of(half + begin);
    const int64_t gate_end = segments_[gate].first_row + segments_[gate].num_rows;
    const int64_t up_end = segments_[up].first_row + segments_[up].num_rows - half;
    const int64_t end = std::min({half, gate_end, up_end});
    gated_pieces_.push_back({begin, end, gate, up});
    begin = end;
  }
}

// Asked for by every chunk, and a chunk of a decode step is half a microsecond: its divisions would show.
TiledLinear::Cut TiledLinear::cut(int64_t num_tokens, bool gated) const {
  PARTITA_CHECK(!gated || out_features % 2 == 0, "gated: got ", out_features, " rows, wanted an even number");
  if (num_tokens > kernels_->max_decode_tokens) return cut_anew(num_tokens, gated);
  Cut cut = gated ? gated_decode_cut_ : decode_cut_;
  cut.token_block = std::max<int64_t>(1, num_tokens);
  return cut;
}

TiledLinear::Cut TiledLinear::cut_anew(int64_t num_tokens, bool gated) const {
  Cut cut;
  const int64_t num_blocks = std::max<int64_t>(1, ceil_div(num_tokens, kernels_->token_block));
  cut.token_block = std::max<int64_t>(1, ceil_div(num_tokens, num_blocks));
  int64_t tiles = kPrefillChunkTiles;
  if (num_tokens <= kernels_->max_decode_tokens)
    tiles = kDecodeChunkBytes * total_tiles_ / static_cast<int64_t>(packed_bytes_);
  if (gated) tiles /= 2;
  const int64_t output_tiles = gated ? total_tiles_ / 2 : total_tiles_;
  tiles = std::min(tiles, output_tiles * num_blocks / kMinChunks);
  tiles = std::max<int64_t>(2, tiles / 2 * 2);  // kernels take tiles in pairs
  cut.chunk_rows = tiles * kTileRows;
  cut.row_chunks = 0;
  for (const Piece& piece : pieces(gated)) cut.row_chunks += ceil_div(piece.end - piece.begin, cut.chunk_rows);
  return cut;
}

int64_t TiledLinear::num_chunks(int64_t num_tokens, bool gated) const {
  if (num_tokens <= 0) return 0;
  const Cut c = cut(num_tokens, gated);
  return c.row_chunks * ceil_div(num_tokens, c.token_block);
}

size_t TiledLinear::scratch_bytes(int64_t num_tokens, bool gated) const {
  const Cut c = cut(num_tokens, gated);
  // A range that starts inside a tile covers one tile more.
  const int64_t sums = c.token_block * (c.chunk_rows + kTileRows) * (gated ? 2 : 1);
  return kTileScratchBytes + sums * sizeof(float);
}

const float* TiledLinear::multiply(int segment_idx, int64_t begin, int64_t end, int64_t run_end,
                                   const std::byte* prepared, int64_t num_tokens, float* sums, int64_t sums_stride,
                                   std::byte* scratch) const {
  const Segment& segment = segments_[segment_idx];
  const int64_t first_tile = (begin - segment.first_row) / kTileRows;
  const int64_t end_tile = ceil_div(end - segment.first_row, kTileRows);
  TileProduct product;
  product.layout = &segment.layout;
  product.tiles = segment.tiles + first_tile * segment.layout.tile_bytes;
  product.num_tiles = end_tile - first_tile;
  product.prefetch_end = segment.tiles + ceil_div(run_end - segment.first_row, kTileRows) * segment.layout.tile_bytes;
  product.prepared = prepared;
  product.prepared_row_bytes = row_bytes_;
  product.num_tokens = num_tokens;
  product.sums = sums;
  product.sums_stride = sums_stride;
  product.scratch = scratch;
  kernels_->multiply(product);
  return sums + (begin - segment.first_row - first_tile * kTileRows);
}

TiledLinear::Region TiledLinear::region(const Cut& c, int64_t num_tokens, bool gated, int64_t chunk,
                                        int64_t run_end) const {
  Region r;
  const int64_t block = chunk < c.row_chunks ? 0 : chunk / c.row_chunks;
  r.first_token = block * c.token_block;
  r.num_tokens = std::min(c.token_block, num_tokens - r.first_token);
  int64_t row_chunk = chunk - block * c.row_chunks;
  r.piece = pieces(gated).data();
  for (; row_chunk * c.chunk_rows >= r.piece->end - r.piece->begin; ++r.piece)
    row_chunk -= ceil_div(r.piece->end - r.piece->begin, c.chunk_rows);
  r.begin = r.piece->begin + row_chunk * c.chunk_rows;
  r.end = std::min(r.piece->end, r.begin + c.chunk_rows);
  r.run_end = std::clamp(r.begin + (run_end - chunk) * c.chunk_rows, r.end, r.piece->end);
  return r;
}

void TiledLinear::prefetch_chunk(int64_t num_tokens, bool gated, int64_t chunk) const {
  const Region r = region(cut(num_tokens, gated), num_tokens, gated, chunk, chunk + 1);
  const auto prefetch = [&](int segment_idx, int64_t row) {
    const Segment& segment = segments_[segment_idx];
    const int64_t first = (row - segment.first_row) / kTileRows * segment.layout.tile_bytes;
    const int64_t bytes =
        std::min(kFirstPrefetchBytes, ceil_div(segment.num_rows, kTileRows) * segment.layout.tile_bytes - first);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(segment.tiles + first + at, 0, 2);
  };
  prefetch(r.piece->segment, r.begin);
  if (gated) prefetch(r.piece->up_segment, out_features / 2 + r.begin);
}

void TiledLinear::run_chunk(const std::byte* prepared, int64_t num_tokens, const LinearEpilogue& epilogue,
                            int64_t chunk, int64_t run_end, std::byte* scratch) const {
  const bool gated = epilogue.gate != GateActivation::kNone;
  const Cut c = cut(num_tokens, gated);
  const Region region = this->region(c, num_tokens, gated, chunk, run_end);
  const int64_t first_token = region.first_token, block_tokens = region.num_tokens;
  const int64_t begin = region.begin, end = region.end;

  // Outputs of many tokens have left the cache since they were last touched: ask for them before the dots, so that
  // the stores after them do not wait.
  if (num_tokens > kernels_->max_decode_tokens)
    for (int64_t t = first_token; t < first_token + block_tokens; ++t)
      for (int64_t r = begin; r < end; r += kTileRows)
        __builtin_prefetch(epilogue.out + t * epilogue.out_stride + r, 1, 2);

  const std::byte* rows = prepared + first_token * row_bytes_;
  auto* sums = reinterpret_cast<float*>(scratch + kTileScratchBytes);
  const int64_t sums_stride = c.chunk_rows + kTileRows;
  const int64_t half = out_features / 2;
  SumsStore store;
  store.sums =
      multiply(region.piece->segment, begin, end, region.run_end, rows, block_tokens, sums, sums_stride, scratch);
  store.up_sums = nullptr;
  if (gated)
    store.up_sums = multiply(region.piece->up_segment, half + begin, half + end, half + region.run_end, rows,
                             block_tokens, sums + c.token_block * sums_stride, sums_stride, scratch);
  store.sums_stride = sums_stride;
  store.num_tokens = block_tokens;
  store.num_rows = end - begin;
  store.out = epilogue.out + first_token * epilogue.out_stride + begin;
  store.out_stride = epilogue.out_stride;
  store.bias = epilogue.bias ? epilogue.bias + begin : nullptr;
  store.up_bias = epilogue.bias && gated ? epilogue.bias + half + begin : nullptr;
  store.add_to_out = epilogue.add_to_out;
  store.gate = epilogue.gate;
  kernels_->store(store);
}

}  // namespace

std::unique_ptr<PackedLinear> pack_linear(const std::vector<Weight>& segments, ActivationType activations,
                                          int num_threads) {
  PARTITA_CHECK(!segments.empty(), "weights: got no segments, wanted at least one");
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].check(concat("weights[", i, "]").c_str());
    PARTITA_CHECK(segments[i].in_features == segments[0].in_features, "weights[", i, "]: got in_features ",
                  segments[i].in_features, ", wanted ", segments[0].in_features, " as in weights[0]");
  }
  return std::make_unique<TiledLinear>(segments, activations, num_threads);
}

}  // namespace partita
