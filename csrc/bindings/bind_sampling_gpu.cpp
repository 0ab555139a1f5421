#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>

#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "sampling/sampling_gpu.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// [S, V] fp32 with the rows that they belong to.
struct LogitRows {
  LogitRows(const Gpu& gpu, const py::object& logits_object) : logits(gpu, logits_object, "logits") {
    logits->expect(DType::kF32, {-1, -1});
    num_rows = logits->shape[0];
    vocab_size = logits->shape[1];
    PARTITA_CHECK(num_rows <= 65535, "logits: got ", num_rows, " rows, wanted at most 65535");
  }

  GpuArrayArgument logits;
  int64_t num_rows, vocab_size;
};

template <typename T>
T* data_of(const GpuArrayArgument& argument) {
  return static_cast<T*>(argument.view().data);
}

GpuArrayArgument array_of(const Gpu& gpu, const py::object& object, const char* name, DType dtype,
                          std::initializer_list<int64_t> shape) {
  GpuArrayArgument argument(gpu, object, name);
  argument->expect(dtype, shape);
  return argument;
}

// The rows' parameters with a workspace: what one lane samples with.
class GpuSampler {
 public:
  GpuSampler(std::shared_ptr<Gpu> gpu, int num_rows, int64_t vocab_size, int max_logit_rows, int64_t max_tokens,
             int max_stop_token_ids, int max_logit_biases)
      : gpu_(std::move(gpu)),
        vocab_size_(vocab_size),
        max_tokens_(max_tokens),
        rows_(gpu_, num_rows, vocab_size, {max_stop_token_ids, max_logit_biases}) {
    const size_t bytes = sample_gpu_workspace_bytes(*gpu_, max_logit_rows, vocab_size, max_tokens, rows_.capacity());
    workspace_ = GpuBuffer(gpu_, bytes, "sampling workspace");
    gpu_->fill(workspace_.data(), 0, bytes, gpu_->default_stream());
    gpu_->synchronize(gpu_->default_stream());
    max_logit_rows_ = max_logit_rows;
  }

  void set_row(int row, const SamplingParams& params, int64_t num_prompt_tokens, const py::object& stream) {
    rows_.set(row, params, num_prompt_tokens, stream_argument(*gpu_, stream));
  }

  void sample(const py::object& logits_object, const py::object& logit_rows, const py::object& num_tokens,
              const py::object& tokens, const py::object& sampled, const py::object& logprobs, const py::object& ranks,
              const py::object& top_ids, const py::object& top_logprobs, bool adjusts, bool draws,
              const py::object& stream) {
    const LogitRows logits(*gpu_, logits_object);
    PARTITA_CHECK(logits.vocab_size == vocab_size_, "logits: got a vocabulary of ", logits.vocab_size, ", wanted ",
                  vocab_size_);
    const int64_t num_rows = logits.num_rows;
    const auto logit_rows_array = array_of(*gpu_, logit_rows, "logit_rows", DType::kI32, {num_rows});
    const auto num_tokens_array = array_of(*gpu_, num_tokens, "num_tokens", DType::kI32, {num_rows});
    const auto tokens_array = array_of(*gpu_, tokens, "tokens", DType::kI32, {rows_.num_rows(), -1});
    const auto sampled_array = array_of(*gpu_, sampled, "sampled", DType::kI32, {num_rows});
    SampleGpuParams params;
    params.num_logit_rows = static_cast<int>(num_rows);
    params.vocab_size = logits.vocab_size;
    params.logits = data_of<float>(logits.logits);
    params.logits_stride = logits.vocab_size;
    params.logit_rows = data_of<int32_t>(logit_rows_array);
    params.num_tokens = data_of<int32_t>(num_tokens_array);
    params.tokens = data_of<int32_t>(tokens_array);
    params.tokens_stride = tokens_array->shape[1];
    params.rows = rows_.view();
    params.capacity = rows_.capacity();
    params.workspace = {workspace_.data(), max_logit_rows_, max_tokens_};
    params.sampled = data_of<int32_t>(sampled_array);
    params.features = {adjusts, draws, !logprobs.is_none()};
    std::optional<GpuArrayArgument> logprobs_array, ranks_array, top_ids_array, top_logprobs_array;
    if (params.features.logprobs) {
      logprobs_array = array_of(*gpu_, logprobs, "logprobs", DType::kF32, {num_rows});
      ranks_array = array_of(*gpu_, ranks, "ranks", DType::kI32, {num_rows});
      top_ids_array = array_of(*gpu_, top_ids, "top_ids", DType::kI32, {num_rows, kMaxTopLogprobs});
      top_logprobs_array = array_of(*gpu_, top_logprobs, "top_logprobs", DType::kF32, {num_rows, kMaxTopLogprobs});
      params.logprobs = data_of<float>(*logprobs_array);
      params.ranks = data_of<int32_t>(*ranks_array);
      params.top_ids = data_of<int32_t>(*top_ids_array);
      params.top_logprobs = data_of<float>(*top_logprobs_array);
    }
    const GpuStream on = stream_argument(*gpu_, stream);
    const py::gil_scoped_release no_gil;
    sample_gpu(*gpu_, params, on);
  }

 private:
  std::shared_ptr<Gpu> gpu_;
  int64_t vocab_size_;
  int64_t max_tokens_;
  int max_logit_rows_ = 0;
  GpuSamplingRows rows_;
  GpuBuffer workspace_;
};

void score(const py::object& logits_object, const py::object& logit_rows, const py::object& num_tokens,
           const py::object& tokens, const py::object& scores, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({logits_object});
  const LogitRows logits(*gpu, logits_object);
  const auto logit_rows_array = array_of(*gpu, logit_rows, "logit_rows", DType::kI32, {logits.num_rows});
  const auto num_tokens_array = array_of(*gpu, num_tokens, "num_tokens", DType::kI32, {logits.num_rows});
  const auto tokens_array = array_of(*gpu, tokens, "tokens", DType::kI32, {-1, -1});
  const auto scores_array = array_of(*gpu, scores, "scores", DType::kF32, {logits.num_rows});
  ScoreGpuParams params;
  params.num_logit_rows = static_cast<int>(logits.num_rows);
  params.vocab_size = logits.vocab_size;
  params.logits = data_of<float>(logits.logits);
  params.logits_stride = logits.vocab_size;
  params.logit_rows = data_of<int32_t>(logit_rows_array);
  params.num_tokens = data_of<int32_t>(num_tokens_array);
  params.tokens = data_of<int32_t>(tokens_array);
  params.tokens_stride = tokens_array->shape[1];
  params.scores = data_of<float>(scores_array);
  const GpuStream on = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  score_gpu(*gpu, params, on);
}

void soft_cap(const py::object& logits_object, float cap, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({logits_object});
  const LogitRows logits(*gpu, logits_object);
  const SoftCapGpuParams params{static_cast<int>(logits.num_rows), logits.vocab_size, data_of<float>(logits.logits),
                                logits.vocab_size, cap};
  const GpuStream on = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  soft_cap_gpu(*gpu, params, on);
}

}  // namespace

void register_sampling_gpu(py::module_& module) {
  module.attr("max_top_logprobs") = kMaxTopLogprobs;
  py::class_<GpuSampler>(module, "GpuSampler")
      .def(py::init<std::shared_ptr<Gpu>, int, int64_t, int, int64_t, int, int>(), py::arg("gpu"), py::arg("num_rows"),
           py::arg("vocab_size"), py::arg("max_logit_rows"), py::arg("max_tokens"), py::arg("max_stop_token_ids") = 64,
           py::arg("max_logit_biases") = 512)
      .def("set_row", &GpuSampler::set_row, py::arg("row"), py::arg("params"), py::arg("num_prompt_tokens"),
           py::arg("stream") = py::none())
      .def("sample", &GpuSampler::sample, py::arg("logits"), py::arg("logit_rows"), py::arg("num_tokens"),
           py::arg("tokens"), py::arg("sampled"), py::arg("logprobs") = py::none(), py::arg("ranks") = py::none(),
           py::arg("top_ids") = py::none(), py::arg("top_logprobs") = py::none(), py::arg("adjusts") = true,
           py::arg("draws") = true, py::arg("stream") = py::none());
  module.def("score_gpu", &score, py::arg("logits"), py::arg("logit_rows"), py::arg("num_tokens"), py::arg("tokens"),
             py::arg("scores"), py::arg("stream") = py::none());
  module.def("soft_cap_gpu", &soft_cap, py::arg("logits"), py::arg("cap"), py::arg("stream") = py::none());
}

}  // namespace partita::bindings
