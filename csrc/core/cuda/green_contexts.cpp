#include "core/cuda/green_contexts.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "core/check.h"

namespace partita {

struct GreenContexts::Driver {
  decltype(&cuGetErrorString) get_error_string;
  decltype(&cuDeviceGetDevResource) get_resource;
  decltype(&cuDevSmResourceSplitByCount) split;
  decltype(&cuDevResourceGenerateDesc) describe;
  decltype(&cuGreenCtxCreate) create_context;
  decltype(&cuGreenCtxDestroy) destroy_context;
  decltype(&cuGreenCtxStreamCreate) create_stream;
  decltype(&cuStreamDestroy) destroy_stream;
};

namespace {

// cuGreenCtxStreamCreate came with 12.5 and the rest with 12.4; an entry's version is that of its signature.
template <typename Function>
bool find(const char* name, unsigned version, Function* function) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found);
#else
  static_cast<void>(version);
  const cudaError_t status = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return false;
  }
  *function = reinterpret_cast<Function>(entry);
  return entry != nullptr;
}

}  // namespace

GreenContexts::GreenContexts(int ordinal) : ordinal_(ordinal) {
  auto driver = std::make_unique<Driver>();
  if (!find("cuGetErrorString", 12000, &driver->get_error_string) ||
      !find("cuStreamDestroy", 12000, &driver->destroy_stream) ||
      !find("cuDeviceGetDevResource", 12040, &driver->get_resource) ||
      !find("cuDevSmResourceSplitByCount", 12040, &driver->split) ||
      !find("cuDevResourceGenerateDesc", 12040, &driver->describe) ||
      !find("cuGreenCtxCreate", 12040, &driver->create_context) ||
      !find("cuGreenCtxDestroy", 12040, &driver->destroy_context) ||
      !find("cuGreenCtxStreamCreate", 12050, &driver->create_stream)) {
    note_ = "the driver has no green contexts (it needs to be of CUDA 12.5 or later): lanes share all SMs";
    return;
  }
  const CUresult status = driver->get_resource(ordinal, &whole_, CU_DEV_RESOURCE_TYPE_SM);
  if (status != CUDA_SUCCESS) {
    const char* text = nullptr;
    driver->get_error_string(status, &text);
    note_ = concat("cuDeviceGetDevResource: ", text ? text : "unknown error", " (", static_cast<int>(status),
                   "): lanes share all SMs");
    return;
  }
#if CUDA_VERSION >= 13000
  smallest_ = static_cast<int>(whole_.sm.minSmPartitionSize);
  granularity_ = static_cast<int>(whole_.sm.smCoscheduledAlignment);
#endif
  if (smallest_ <= 0 || granularity_ <= 0) {  // a toolkit or driver that does not say: the rule by capability
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    smallest_ = major >= 9 ? 8 : 4;
    granularity_ = major >= 9 ? 8 : 2;
  }
  driver_ = driver.release();
  is_available_ = true;
  note_ =
      concat("green contexts: parts of at least ", smallest_, " SMs in steps of ", granularity_, ", of ", num_sms());
}

GreenContexts::~GreenContexts() {
  for (const Part& part : parts_) {
    driver_->destroy_stream(part.stream);
    driver_->destroy_context(part.context);
  }
  delete driver_;
}

void GreenContexts::check(CUresult status, const char* call) const {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver_->get_error_string(status, &text);
  throw std::runtime_error(concat(call, ": ", text ? text : "unknown error", " (", static_cast<int>(status), ")"));
}

GreenContexts::Part GreenContexts::make_part(CUdevResource resource) {
  CUdevResourceDesc description;
  check(driver_->describe(&description, &resource, 1), "cuDevResourceGenerateDesc");
  Part part{};
  check(driver_->create_context(&part.context, description, ordinal_, CU_GREEN_CTX_DEFAULT_STREAM), "cuGreenCtxCreate");
  const CUresult status = driver_->create_stream(&part.stream, part.context, CU_STREAM_NON_BLOCKING, 0);
  if (status != CUDA_SUCCESS) {
    driver_->destroy_context(part.context);
    check(status, "cuGreenCtxStreamCreate");
  }
  parts_.push_back(part);
  return part;
}

int GreenContexts::granted(int first_sms) const {
  const int most = (num_sms() - smallest_) / granularity_ * granularity_;  // the remainder is a part too
  return std::min((std::max(first_sms, smallest_) + granularity_ - 1) / granularity_ * granularity_, most);
}

GpuRung GreenContexts::make_rung(int first_sms) {
  PARTITA_CHECK(first_sms > 0 && granted(first_sms) > 0, "first_sms: got ", first_sms, " of ", num_sms(),
                " SMs, wanted at least 1 and parts of at least ", smallest_);
  CUdevResource first{}, second{};
  unsigned num_groups = 1;
  check(driver_->split(&first, &num_groups, &whole_, &second, 0, static_cast<unsigned>(granted(first_sms))),
        "cuDevSmResourceSplitByCount");
  if (num_groups != 1 || second.sm.smCount == 0)
    throw std::runtime_error(concat("cuDevSmResourceSplitByCount: got ", num_groups, " groups and ", second.sm.smCount,
                                    " SMs beside them, wanted one group and the rest"));
  GpuRung rung;
  rung.first_sms = static_cast<int>(first.sm.smCount);
  rung.second_sms = static_cast<int>(second.sm.smCount);
  rung.first = make_part(first).stream;
  rung.second = make_part(second).stream;  // the remainder: what the first part left
  return rung;
}

}  // namespace partita
