#include "attention/attention_plan_gpu.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace partita {
namespace {

constexpr int64_t kHeaderEntries = 4;  // [0] number of merges
constexpr size_t kWorkspaceAlignment = 256;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

size_t partial_bytes(int64_t rows, int head_dim) {
  if (rows == 0) return 0;
  // Sums first: [rows, 2] and [rows, D] fp32, each from a multiple of the alignment.
  return static_cast<size_t>(round_up(rows * 2 * 4, kWorkspaceAlignment) +
                             round_up(rows * head_dim * 4, kWorkspaceAlignment));
}

int64_t max_fixed_splits(int64_t max_context) { return max_context / kFixedSplitTokens + 2; }

// One part of a split pair.
struct Part {
  int32_t token_begin, num_tokens, kv_head, partial_row, kv_begin;
};

}  // namespace

// Makes one plan. Kinds: decode tiles and prefill tiles, each with a launch of its own.
struct GpuAttentionPlan::Builder {
  const GpuAttentionDesc& desc;
  const GpuPlanOptions& options;
  int group, num_kv_heads;
  std::vector<Part> parts;
  int64_t partial_rows = 0;

  struct Kind {
    std::vector<Tile> tiles;
    std::vector<GpuAttendItem> items;
    std::vector<int32_t> queues;
    int num_ctas = 0;
  };

  int32_t take_partial_rows(const Tile& tile) {
    const auto first = static_cast<int32_t>(partial_rows);
    partial_rows += int64_t{tile.num_tokens} * group;
    return first;
  }

  void add_item(Kind& kind, const Tile& tile, int kv_head, int32_t kv_begin, int32_t kv_end, bool is_part) {
    GpuAttendItem item{tile.request, kv_head, tile.token_begin, tile.num_tokens, kv_begin, kv_end, -1, 0};
    if (is_part) {
      item.partial_row = take_partial_rows(tile);
      parts.push_back({tile.token_begin, tile.num_tokens, kv_head, item.partial_row, kv_begin});
    }
    kind.items.push_back(item);
  }

  // Borders wherever the sequence's equal parts end.
  void cut_evenly(Kind& kind, int max_ctas) {
    int64_t kv_tiles = 0, total = 0;
    for (const Tile& tile : kind.tiles) {
      kv_tiles += int64_t{tile.num_kv_tiles()} * num_kv_heads;
      total += int64_t{tile.num_kv_tiles() + kAttendItemTiles} * num_kv_heads;
    }
    const int num_used = static_cast<int>(std::clamp<int64_t>(kv_tiles / kMinSplitTiles, 1, max_ctas));
    kind.num_ctas = num_used;
    kind.queues.assign(1, 0);
    int cta = 0;
    int64_t done = 0;
    const auto border = [&] { return total * (cta + 1) / num_used; };
    const auto next_cta = [&] {
      ++cta;
      kind.queues.push_back(static_cast<int32_t>(kind.items.size()));
    };
    for (const Tile& tile : kind.tiles)
      for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
        const int first_tile = tile.kv_begin / kAttendTileTokens, last_tile = first_tile + tile.num_kv_tiles();
        int at = first_tile;
        while (at < last_tile) {
          const int remaining = last_tile - at;
          const int64_t fixed = at == first_tile ? kAttendItemTiles : 0;
          const int64_t room = border() - done - fixed;
          int taken = remaining;
          if (cta + 1 < num_used && remaining > room + kMinSplitTiles - 1) {
            if (room < kMinSplitTiles) {
              // A block is only left with nothing where the ones before it took more than their part.
              next_cta();
              continue;
            }
            if (remaining - room >= kMinSplitTiles) taken = static_cast<int>(room);
          }
          const bool is_part = tile.is_shared || taken < last_tile - first_tile;
          add_item(kind, tile, kv_head, std::max(tile.kv_begin, at * kAttendTileTokens),
                   std::min(tile.kv_end, (at + taken) * kAttendTileTokens), is_part);
          at += taken;
          done += taken + fixed;
          while (cta + 1 < num_used && done >= border()) next_cta();
        }
      }
    while (static_cast<int>(kind.queues.size()) <= num_used)
      kind.queues.push_back(static_cast<int32_t>(kind.items.size()));
  }

  // Splits at fixed positions; where the step ends decides nothing but which block computes them.
  void cut_at_fixed_positions(Kind& kind, int max_ctas) {
    int64_t total = 0;
    for (const Tile& tile : kind.tiles) total += int64_t{tile.num_kv_tiles() + kAttendItemTiles} * num_kv_heads;
    kind.num_ctas = static_cast<int>(std::clamp<int64_t>(total / kMinSplitTiles, 1, max_ctas));
    kind.queues.assign(1, 0);
    int64_t done = 0;
    for (const Tile& tile : kind.tiles) {
      const int first_split = tile.kv_begin / kFixedSplitTokens, last_split = (tile.kv_end - 1) / kFixedSplitTokens;
      const bool is_part = tile.is_shared || last_split > first_split;
      for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head)
        for (int split = first_split; split <= last_split; ++split) {
          const int32_t begin = std::max(tile.kv_begin, split * kFixedSplitTokens);
          const int32_t end = std::min(tile.kv_end, (split + 1) * kFixedSplitTokens);
          while (static_cast<int>(kind.queues.size()) < kind.num_ctas &&
                 done >= total * static_cast<int64_t>(kind.queues.size()) / kind.num_ctas)
            kind.queues.push_back(static_cast<int32_t>(kind.items.size()));
          add_item(kind, tile, kv_head, begin, end, is_part);
          done += (end - begin + kAttendTileTokens - 1) / kAttendTileTokens + (split == first_split ? 2 : 0);
        }
    }
    while (static_cast<int>(kind.queues.size()) <= kind.num_ctas)
      kind.queues.push_back(static_cast<int32_t>(kind.items.size()));
  }

  void cut(Kind& kind, int max_ctas) {
    if (kind.tiles.empty()) return;
    if (options.is_batch_invariant)
      cut_at_fixed_positions(kind, max_ctas);
    else
      cut_evenly(kind, max_ctas);
  }

  // Parts of each (token, KV head), in ascending order of their positions.
  void gather_merges(int64_t num_tokens, std::vector<GpuAttendMerge>& merges, std::vector<int32_t>& merge_parts) {
    if (parts.empty()) return;
    if (!options.shared_prefixes.empty())
      std::stable_sort(parts.begin(), parts.end(),
                       [](const Part& a, const Part& b) { return a.kv_begin < b.kv_begin; });
    std::vector<int32_t> merge_of(num_tokens * num_kv_heads, 0);
    for (const Part& part : parts)
      for (int t = 0; t < part.num_tokens; ++t) ++merge_of[(part.token_begin + t) * num_kv_heads + part.kv_head];
    int32_t first_part = 0;
    for (int64_t i = 0; i < num_tokens * num_kv_heads; ++i) {
      const int32_t count = merge_of[i];
      if (count == 0) continue;
      merge_of[i] = static_cast<int32_t>(merges.size());
      merges.push_back({static_cast<int32_t>(i / num_kv_heads), static_cast<int32_t>(i % num_kv_heads), first_part, 0});
      first_part += count;
    }
    merge_parts.resize(first_part);
    for (const Part& part : parts)
      for (int t = 0; t < part.num_tokens; ++t) {
        GpuAttendMerge& merge = merges[merge_of[(part.token_begin + t) * num_kv_heads + part.kv_head]];
        merge_parts[merge.first_part + merge.num_parts++] = part.partial_row + t * group;
      }
  }
};

GpuAttentionPlan::GpuAttentionPlan(std::shared_ptr<Gpu> gpu, const GpuAttentionDesc& desc)
    : gpu_(std::move(gpu)), desc_(desc) {
  PARTITA_CHECK(gpu_ != nullptr, "gpu: got none");
  selection_ = select_attend(*gpu_, desc_);
}

namespace {

// Most thread blocks of a launch. An SM has 1 KiB of shared memory more than one block may ask for, and each block
// takes 1 KiB beside its own.
int max_ctas(const Gpu& gpu, int ctas_per_sm, size_t shared_bytes, int wanted) {
  const GpuProperties& chip = gpu.properties();
  const int by_shared = static_cast<int>((chip.shared_bytes_per_block + 1024) / (shared_bytes + 1024));
  const int resident = std::max(1, chip.num_sms * std::clamp(by_shared, 1, ctas_per_sm));
  return wanted > 0 ? std::min(wanted, resident) : resident;
}

int max_decode_ctas(const Gpu& gpu, const AttendDecodeKernel& kernel, int num_columns, int wanted) {
  return max_ctas(gpu, kernel.ctas_per_sm(num_columns), kernel.shared_bytes(num_columns), wanted);
}
int max_prefill_ctas(const Gpu& gpu, const AttendPrefillKernel& kernel, int wanted) {
  return max_ctas(gpu, kernel.ctas_per_sm, kernel.shared_bytes, wanted);
}

// What a decode graph's plan leaves room for, beyond which no step of its rows goes. A border between two blocks splits
// one pair of (request, KV head) and makes two parts of it.
struct GraphRoom {
  int64_t items, merges, parts;
};

GraphRoom graph_room(const GpuPlanOptions& options, int num_kv_heads, int64_t max_context, int64_t num_ctas) {
  const int64_t pairs = int64_t{options.graph_rows} * num_kv_heads;
  if (!options.is_batch_invariant) return {pairs + num_ctas, std::min(pairs, num_ctas), 2 * num_ctas};
  const int64_t splits = pairs * max_fixed_splits(max_context);
  return {splits, pairs, splits};
}

void check_shared_prefixes(const GpuPlanOptions& options, const KvGroupLayout& layout, int num_requests,
                           const int32_t* context_starts) {
  int next_request = 0;
  for (const GpuSharedPrefix& prefix : options.shared_prefixes) {
    PARTITA_CHECK(layout.window == 0, "shared_prefixes: got some for a group with a window of ", layout.window,
                  " tokens, wanted none");
    PARTITA_CHECK(prefix.first_request >= next_request && prefix.num_requests >= 1 &&
                      prefix.first_request + prefix.num_requests <= num_requests,
                  "shared_prefixes: got requests ", prefix.first_request, " to ",
                  prefix.first_request + prefix.num_requests - 1, ", wanted ascending ranges within 0 to ",
                  num_requests - 1);
    PARTITA_CHECK(prefix.num_tokens >= 0 && prefix.num_tokens % layout.page_size == 0,
                  "shared_prefixes: got num_tokens ", prefix.num_tokens, ", wanted a multiple of the page size ",
                  layout.page_size);
    next_request = prefix.first_request + prefix.num_requests;
    for (int r = prefix.first_request; r < next_request; ++r)
      PARTITA_CHECK(context_starts[r] < 0 || prefix.num_tokens <= context_starts[r], "shared_prefixes: got num_tokens ",
                    prefix.num_tokens, " for request ", r, ", whose queries begin at ", context_starts[r]);
  }
}

}  // namespace

void GpuAttentionPlan::build(int num_requests, const int32_t* cu_seqlens_q, const int32_t* context_starts,
                             const GpuPlanOptions& options) {
  const KvGroupLayout& layout = desc_.layout;
  const int group = desc_.num_q_heads / layout.num_kv_heads;
  PARTITA_CHECK(num_requests >= 0 && (num_requests == 0 || (cu_seqlens_q && context_starts)), "num_requests: got ",
                num_requests, " with null arrays");
  PARTITA_CHECK(options.num_ctas >= 0, "num_ctas: got ", options.num_ctas, ", wanted 0 or a positive number");
  for (int r = 0; r < num_requests; ++r) {
    const int64_t count = int64_t{cu_seqlens_q[r + 1]} - cu_seqlens_q[r];
    PARTITA_CHECK(count >= 0, "cu_seqlens_q: got ", cu_seqlens_q[r], " before ", cu_seqlens_q[r + 1],
                  ", wanted values that do not fall");
    PARTITA_CHECK(options.graph_rows == 0 || count == 1, "cu_seqlens_q: got ", count, " tokens for request ", r,
                  ", wanted one in a decode graph's plan");
  }
  PARTITA_CHECK(options.graph_rows == 0 || num_requests == options.graph_rows, "num_requests: got ", num_requests,
                ", wanted graph_rows = ", options.graph_rows);
  PARTITA_CHECK(options.graph_rows == 0 || options.shared_prefixes.empty(),
                "shared_prefixes: got some in a decode graph's plan, wanted none");
  check_shared_prefixes(options, layout, num_requests, context_starts);
  if (options.graph_rows > 0 && options.is_batch_invariant)
    for (int r = 0; r < num_requests; ++r)
      PARTITA_CHECK(context_starts[r] < options.max_context, "max_context: got ", options.max_context,
                    ", wanted more than the position ", context_starts[r], " of request ", r);

  tables_.clear();
  decode_ = prefill_ = {};
  merge_ = {};
  workspace_bytes_ = 0;
  num_partial_rows_ = num_items_ = num_merges_ = 0;
  if (!selection_.prefill) return;  // the naive kernel needs no plan

  Builder builder{desc_, options, group, layout.num_kv_heads, {}, 0};
  Builder::Kind decode_kind, prefill_kind;
  const int prefill_tokens = std::max(1, selection_.prefill->tile_rows / group);
  const int decode_tokens = selection_.decode ? selection_.decode_columns / group : 0;
  const bool may_decode = selection_.decode && !options.is_batch_invariant;
  int max_decode_rows = group;
  // Tiles of consecutive tokens, of one request or of several that share these positions.
  const auto add_tiles = [&](int request, int32_t begin, int32_t end, auto range_of, bool is_shared) {
    const bool is_decode = may_decode && end - begin <= kMaxDecodeTiles * decode_tokens;
    const int step = is_decode ? decode_tokens : prefill_tokens;
    for (int32_t token = begin; token < end; token += step) {
      Tile tile{request, token, std::min<int32_t>(step, end - token), 0, 0, is_shared};
      range_of(tile);
      if (is_decode) max_decode_rows = std::max(max_decode_rows, tile.num_tokens * group);
      (is_decode ? decode_kind : prefill_kind).tiles.push_back(tile);
    }
  };

  std::vector<int32_t> own_begin(num_requests, 0);  // positions before it are read with those who share them
  for (const GpuSharedPrefix& prefix : options.shared_prefixes) {
    int64_t shared = prefix.num_tokens;
    if (options.is_batch_invariant) shared -= shared % kFixedSplitTokens;
    const int end_request = prefix.first_request + prefix.num_requests;
    int num_members = 0;
    for (int r = prefix.first_request; r < end_request; ++r)
      num_members += cu_seqlens_q[r + 1] > cu_seqlens_q[r] && context_starts[r] >= 0;
    // Padding inside the range would put its rows into the tile; one member alone has nobody to share with.
    if (shared == 0 || num_members < 2 || num_members != prefix.num_requests) continue;
    for (int r = prefix.first_request; r < end_request; ++r) own_begin[r] = static_cast<int32_t>(shared);
    add_tiles(
        prefix.first_request, cu_seqlens_q[prefix.first_request], cu_seqlens_q[end_request],
        [&](Tile& tile) { tile.kv_end = static_cast<int32_t>(shared); }, true);
  }
  for (int r = 0; r < num_requests; ++r) {
    if (context_starts[r] < 0) continue;
    add_tiles(
        r, cu_seqlens_q[r], cu_seqlens_q[r + 1],
        [&](Tile& tile) {
          const int32_t first = context_starts[r] + tile.token_begin - cu_seqlens_q[r];
          tile.kv_begin = layout.window > 0 && first >= layout.window ? first - layout.window + 1 : own_begin[r];
          tile.kv_end = first + tile.num_tokens;
        },
        own_begin[r] > 0);
  }

  decode_.num_columns = max_decode_rows <= 8 ? 8 : 16;
  const int decode_ctas =
      selection_.decode ? max_decode_ctas(*gpu_, *selection_.decode, decode_.num_columns, options.num_ctas) : 1;
  const int prefill_ctas = max_prefill_ctas(*gpu_, *selection_.prefill, options.num_ctas);
  builder.cut(decode_kind, decode_ctas);
  builder.cut(prefill_kind, prefill_ctas);
  const int64_t num_tokens = num_requests ? cu_seqlens_q[num_requests] : 0;
  std::vector<GpuAttendMerge> merges;
  std::vector<int32_t> merge_parts;
  builder.gather_merges(num_tokens, merges, merge_parts);
  num_partial_rows_ = builder.partial_rows;
  num_items_ = static_cast<int64_t>(decode_kind.items.size() + prefill_kind.items.size());
  num_merges_ = static_cast<int64_t>(merges.size());

  // Where things lie. A graph's plan leaves room for the most that its number of rows can need.
  int64_t merge_room = num_merges_, part_room = static_cast<int64_t>(merge_parts.size());
  int64_t decode_room = static_cast<int64_t>(decode_kind.items.size());
  int64_t prefill_room = static_cast<int64_t>(prefill_kind.items.size());
  if (options.graph_rows > 0) {
    Builder::Kind& kind = may_decode ? decode_kind : prefill_kind;
    const int ctas = may_decode ? decode_ctas : prefill_ctas;
    const GraphRoom room = graph_room(options, layout.num_kv_heads, options.max_context, ctas);
    (may_decode ? decode_room : prefill_room) = room.items;
    merge_room = room.merges;
    part_room = room.parts;
    num_partial_rows_ = room.parts * group;
    if (kind.queues.empty()) kind.queues.push_back(0);
    kind.queues.resize(ctas + 1, kind.queues.back());
    kind.num_ctas = ctas;
  }
  int64_t at = kHeaderEntries;
  const auto place = [&](Launch& launch, const Builder::Kind& kind, int64_t room) {
    launch.num_ctas = kind.num_ctas;
    launch.queues = at;
    at = round_up(at + static_cast<int64_t>(kind.queues.size()), 4);
    launch.items = at;
    at += room * kAttendItemEntries;
  };
  place(decode_, decode_kind, decode_room);
  place(prefill_, prefill_kind, prefill_room);
  merge_.count = 0;
  merge_.merges = at;
  at += merge_room * kAttendMergeEntries;
  merge_.parts = at;
  at = round_up(at + part_room, 4);
  constexpr int kMergeRowsPerCta = 4;
  if (merge_room > 0)
    merge_.num_ctas = static_cast<int>(std::min<int64_t>((merge_room * group + kMergeRowsPerCta - 1) / kMergeRowsPerCta,
                                                         max_ctas(*gpu_, 8, 0, options.num_ctas)));
  tables_.assign(at, 0);
  tables_[0] = static_cast<int32_t>(num_merges_);
  const auto write = [&](int64_t offset, const auto& values) {
    if (!values.empty()) std::memcpy(tables_.data() + offset, values.data(), values.size() * sizeof(values[0]));
  };
  write(decode_.queues, decode_kind.queues);
  write(decode_.items, decode_kind.items);
  write(prefill_.queues, prefill_kind.queues);
  write(prefill_.items, prefill_kind.items);
  write(merge_.merges, merges);
  write(merge_.parts, merge_parts);
  workspace_bytes_ = partial_bytes(num_partial_rows_, layout.head_dim);
}

namespace {

// Upper bounds of plans.
struct PlanBounds {
  int64_t items, queues, merges, parts, partial_rows;
};

PlanBounds plan_bounds(const Gpu& gpu, const GpuAttentionDesc& desc, const AttendSelection& selection,
                       int64_t max_tokens, int64_t max_requests, int64_t max_context, const GpuPlanOptions& options) {
  if (!selection.prefill) return {};
  const int64_t heads = desc.layout.num_kv_heads, group = desc.num_q_heads / heads;
  const int64_t prefill_tokens = std::max<int64_t>(1, selection.prefill->tile_rows / group);
  int64_t decode_ctas = 0;
  if (selection.decode)
    for (int num_columns = 8; num_columns <= selection.decode_columns; num_columns += 8)
      decode_ctas =
          std::max<int64_t>(decode_ctas, max_decode_ctas(gpu, *selection.decode, num_columns, options.num_ctas));
  const int64_t prefill_ctas = max_prefill_ctas(gpu, *selection.prefill, options.num_ctas);
  const bool has_prefixes = !options.shared_prefixes.empty();
  const int64_t tiles =
      std::min(max_tokens, max_requests * kMaxDecodeTiles + max_tokens / prefill_tokens) * (has_prefixes ? 2 : 1);
  const int64_t pairs = tiles * heads, borders = decode_ctas + prefill_ctas;
  PlanBounds bounds{};
  bounds.queues = borders + 8;
  if (options.graph_rows > 0) {
    const bool may_decode = selection.decode && !options.is_batch_invariant;
    const GraphRoom room =
        graph_room(options, desc.layout.num_kv_heads, max_context, may_decode ? decode_ctas : prefill_ctas);
    bounds.items = room.items;
    bounds.merges = room.merges;
    bounds.parts = room.parts;
    bounds.partial_rows = room.parts * group;
    return bounds;
  }
  if (options.is_batch_invariant) {
    bounds.items = pairs * max_fixed_splits(max_context);
    bounds.parts = max_tokens * heads * (max_fixed_splits(max_context) + has_prefixes);
  } else {
    bounds.items = pairs + borders;
    bounds.parts = 2 * (decode_ctas * (kMaxDecodeColumns / group) + prefill_ctas * prefill_tokens) +
                   (has_prefixes ? 2 * max_tokens * heads : 0);
  }
  bounds.merges = std::min(max_tokens * heads, bounds.parts);
  bounds.partial_rows = bounds.parts * group;
  return bounds;
}

}  // namespace

size_t GpuAttentionPlan::max_table_entries(int64_t max_tokens, int64_t max_requests, int64_t max_context,
                                           const GpuPlanOptions& options) const {
  const PlanBounds bounds = plan_bounds(*gpu_, desc_, selection_, max_tokens, max_requests, max_context, options);
  return static_cast<size_t>(kHeaderEntries + bounds.queues + bounds.items * kAttendItemEntries +
                             bounds.merges * kAttendMergeEntries + bounds.parts + 16);
}

size_t GpuAttentionPlan::max_workspace_bytes(int64_t max_tokens, int64_t max_requests, int64_t max_context,
                                             const GpuPlanOptions& options) const {
  return partial_bytes(
      plan_bounds(*gpu_, desc_, selection_, max_tokens, max_requests, max_context, options).partial_rows,
      desc_.layout.head_dim);
}

std::string GpuAttentionPlan::describe() const {
  return concat(selection_.reasons, "last plan: ", num_items_, " items, decode grid ", decode_.num_ctas, " of ",
                decode_.num_columns, " columns, prefill grid ", prefill_.num_ctas, ", ", num_merges_,
                " merged (token, KV head) pairs, ", tables_.size(), " table entries, ", workspace_bytes_,
                " bytes of workspace\n");
}

}  // namespace partita
