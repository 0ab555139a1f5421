#include <pybind11/stl.h>

#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/aligned_buffer.h"
#include "sampling/philox.h"
#include "sampling/sampling.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// The arrays of one call, checked, with this thread's scratch.
struct SamplingCall {
  SamplingCall(const py::object& logits_object, const SamplingParams& params, const py::object& token_ids_object,
               int64_t num_prompt_tokens)
      : logits(logits_object, "logits", /*writable=*/true), token_ids(token_ids_object, "token_ids") {
    logits->expect(DType::kF32, {-1});
    token_ids->expect(DType::kI32, {-1});
    vocab_size = logits->shape[0];
    history.tokens = token_ids->as<int32_t>();
    history.num_tokens = token_ids->shape[0];
    history.num_prompt_tokens = num_prompt_tokens;
    PARTITA_CHECK(num_prompt_tokens >= 0 && num_prompt_tokens <= history.num_tokens, "num_prompt_tokens: got ",
                  num_prompt_tokens, ", wanted 0 to the ", history.num_tokens, " of token_ids");
    const size_t scratch_bytes = sampling_scratch_bytes(vocab_size);
    params.check(vocab_size);
    thread_local AlignedBuffer buffer;
    if (buffer.bytes() < scratch_bytes) buffer = AlignedBuffer(scratch_bytes);
    scratch = buffer.data();
  }

  ArrayArgument logits;
  ArrayArgument token_ids;
  int64_t vocab_size;
  TokenHistory history;
  std::byte* scratch;
};

SampledToken sample(const py::object& logits, const SamplingParams& params, const py::object& token_ids,
                    int64_t num_prompt_tokens) {
  const SamplingCall call(logits, params, token_ids, num_prompt_tokens);
  const py::gil_scoped_release no_gil;
  return sample_token(call.logits->as<float>(), call.vocab_size, params, call.history, call.scratch);
}

std::vector<std::pair<int32_t, double>> distribution(const py::object& logits, const SamplingParams& params,
                                                     const py::object& token_ids, int64_t num_prompt_tokens) {
  const SamplingCall call(logits, params, token_ids, num_prompt_tokens);
  const py::gil_scoped_release no_gil;
  return sampling_distribution(call.logits->as<float>(), call.vocab_size, params, call.history, call.scratch);
}

}  // namespace

void register_sampling(py::module_& module) {
  py::class_<SamplingParams>(module, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("num_logprobs", &SamplingParams::num_logprobs)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def("check", &SamplingParams::check, py::arg("vocab_size"));
  py::class_<SampledToken>(module, "SampledToken")
      .def_readonly("token", &SampledToken::token)
      .def_readonly("logprob", &SampledToken::logprob)
      .def_readonly("rank", &SampledToken::rank)
      .def_readonly("top", &SampledToken::top);
  module.def("sample_token", &sample, py::arg("logits"), py::arg("params"), py::arg("token_ids"),
             py::arg("num_prompt_tokens"));
  module.def("sampling_distribution", &distribution, py::arg("logits"), py::arg("params"), py::arg("token_ids"),
             py::arg("num_prompt_tokens"));
  module.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
             "Four random words of a 128-bit counter under a 64-bit key (little-endian words).");
}

}  // namespace partita::bindings
