#include "bindings/register.h"
#include "core/cpu_features.h"
#include "core/machine_peaks.h"
#include "core/parallel_for.h"

namespace py = pybind11;

namespace partita::bindings {

void register_core(py::module_& module) {
  module.def(
      "active_cpu_isa", [] { return cpu_isa_name(active_cpu_isa()); },
      "Instruction set the CPU kernels use: portable, avx2 or avx512.");
  module.def("detected_cpu_isa", [] { return cpu_isa_name(detected_cpu_isa()); });
  module.def("set_active_cpu_isa", &set_active_cpu_isa, py::arg("name"),
             "Replaces the active instruction set (tests). Raises ValueError for an unknown or missing one.");
  module.def("usable_cores", &usable_cores, "Cores this process may use: affinity mask and cgroup quota.");
  module.def(
      "machine_peaks",
      [](int num_threads, double seconds) {
        MachinePeaks peaks;
        {
          const py::gil_scoped_release release;
          peaks = measure_machine_peaks(num_threads, seconds);
        }
        py::dict out;
        out["int8_gops"] = peaks.int8_gops;
        out["bf16_gflops"] = peaks.bf16_gflops;
        out["fp32_gflops"] = peaks.fp32_gflops;
        out["read_gb_per_second"] = peaks.read_gb_per_second;
        return out;
      },
      py::arg("num_threads") = 0, py::arg("seconds") = 1.0,
      "Measured int8, bf16 and fp32 arithmetic peaks and read bandwidth of this machine, with the active ISA.");
  module.def("cpu_flags", [] {
    const CpuFlags f = cpu_flags();
    py::dict flags;
    flags["avx2"] = f.avx2;
    flags["fma"] = f.fma;
    flags["f16c"] = f.f16c;
    flags["avx512f"] = f.avx512f;
    flags["avx512bw"] = f.avx512bw;
    flags["avx512dq"] = f.avx512dq;
    flags["avx512vl"] = f.avx512vl;
    flags["avx512vnni"] = f.avx512vnni;
    flags["avx512bf16"] = f.avx512bf16;
    flags["avx_vnni"] = f.avx_vnni;
    flags["amx_int8"] = f.amx_int8;
    flags["amx_bf16"] = f.amx_bf16;
    return flags;
  });
}

}  // namespace partita::bindings
