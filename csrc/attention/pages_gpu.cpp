#include "attention/pages_gpu.h"

#include <stdexcept>

#include "core/check.h"
#include "core/gpu_library.h"

namespace partita {
namespace {

int64_t swap_pages(Gpu& gpu, const SwapPagesParams& params, GpuCopy direction, GpuStream stream) {
  PARTITA_CHECK(params.page_bytes > 0, "page_bytes: got 0, wanted a positive number");
  PARTITA_CHECK(params.num_pages >= 0, "num_pages: got ", params.num_pages, ", wanted at least 0");
  if (params.num_pages == 0) return 0;
  PARTITA_CHECK(params.arena && params.host_arena && params.device_page_ids,
                "arena, host_arena, device_page_ids: got a null pointer");
  const auto device_page = [&](int64_t i) { return int64_t{params.device_page_ids[i]}; };
  const auto host_page = [&](int64_t i) { return params.host_page_ids ? int64_t{params.host_page_ids[i]} : i; };
  for (int64_t i = 0; i < params.num_pages; ++i) {
    PARTITA_CHECK(device_page(i) >= 0, "device_page_ids[", i, "]: got ", device_page(i), ", wanted a page id");
    PARTITA_CHECK(host_page(i) >= 0, "host_page_ids[", i, "]: got ", host_page(i), ", wanted a page id");
  }
  int64_t num_copies = 0;
  for (int64_t begin = 0, end; begin < params.num_pages; begin = end, ++num_copies) {
    end = begin + 1;
    while (end < params.num_pages && device_page(end) == device_page(end - 1) + 1 &&
           host_page(end) == host_page(end - 1) + 1)
      ++end;
    std::byte* device = params.arena + device_page(begin) * params.page_bytes;
    std::byte* host = params.host_arena + host_page(begin) * params.page_bytes;
    const size_t bytes = static_cast<size_t>(end - begin) * params.page_bytes;
    if (direction == GpuCopy::kDeviceToHost)
      gpu.copy(host, device, bytes, direction, stream);
    else
      gpu.copy(device, host, bytes, direction, stream);
  }
  return num_copies;
}

}  // namespace

void copy_pages(Gpu& gpu, const CopyPagesParams& params, GpuStream stream) {
  PARTITA_CHECK(params.max_pairs >= 0 && params.max_pairs < (int64_t{1} << 31), "max_pairs: got ", params.max_pairs,
                ", wanted 0 to 2^31 - 1");
  PARTITA_CHECK(params.page_bytes > 0 && params.page_bytes % 16 == 0, "page_bytes: got ", params.page_bytes,
                ", wanted a multiple of 16");
  if (params.max_pairs == 0) return;
  PARTITA_CHECK(params.arena && params.pairs, "arena, pairs: got a null pointer");
  PARTITA_CHECK(reinterpret_cast<uintptr_t>(params.arena) % 16 == 0, "arena: got an address that is no multiple of 16");
  const auto* kernel = kernels_of(gpu).only<CopyPagesKernel>();
  if (!kernel) throw std::runtime_error("copy_pages: this device library was built without the kernel");
  kernel->launch(params, stream);
}

int64_t swap_pages_out(Gpu& gpu, const SwapPagesParams& params, GpuStream stream) {
  return swap_pages(gpu, params, GpuCopy::kDeviceToHost, stream);
}
int64_t swap_pages_in(Gpu& gpu, const SwapPagesParams& params, GpuStream stream) {
  return swap_pages(gpu, params, GpuCopy::kHostToDevice, stream);
}

}  // namespace partita
