// `pybigmodel._native`: CPU features, the tier of kernels in force, build facts, machine peaks. No tensors.
#include <malloc.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/isa.h"
#include "cpu/introspect.h"
#include "cpu/kernels/roofline.h"

namespace py = pybind11;

namespace {

std::map<std::string, bool> features() {
  const pbm::CpuFeatures& f = pbm::cpu_features();
  return {{"avx2", f.avx2},
          {"fma", f.fma},
          {"f16c", f.f16c},
          {"avx512f", f.avx512f},
          {"avx512bw", f.avx512bw},
          {"avx512dq", f.avx512dq},
          {"avx512vl", f.avx512vl},
          {"avx512_vnni", f.avx512_vnni},
          {"avx512_bf16", f.avx512_bf16},
          {"os_saves_ymm", f.os_ymm},
          {"os_saves_zmm", f.os_zmm}};
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(pbm::best_isa()); i++) names.push_back(pbm::isa_name(static_cast<pbm::Isa>(i)));
  return names;
}

std::string join(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : ", ") + w;
  return s;
}

void force_isa(const std::optional<std::string>& name) {
  pbm::Isa isa = pbm::best_isa();
  if (name && !pbm::isa_from_name(name->c_str(), &isa))
    throw py::value_error("isa must be one of scalar, avx2, avx512, avx512_bf16 or None, got '" + *name + "'");
  if (!pbm::set_active_isa(isa))
    throw std::runtime_error("this CPU cannot run the '" + *name + "' kernels; it has " + join(available_isas()));
}

int peak_kind(const std::string& kind) {
  if (kind == "fp32") return static_cast<int>(pbm::PeakKind::fp32);
  if (kind == "bf16") return static_cast<int>(pbm::PeakKind::bf16);
  if (kind == "int8") return static_cast<int>(pbm::PeakKind::int8);
  throw py::value_error("kind must be 'fp32', 'bf16' or 'int8', got '" + kind + "'");
}

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60))
    throw py::value_error("seconds must be in (0, 60], got " + std::to_string(seconds));
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"flags", PBM_FLAGS},
          {"cuda_archs", PBM_CUDA_ARCHS},
          {"commit", PBM_COMMIT},
          {"torch_abi", PBM_TORCH_TARGET}};
}

// glibc gives blocks above its mmap threshold back to the kernel when they are freed, and every use of the next such
// output then costs a page fault for each 4 KiB: for large outputs more than the computing.
void retain_memory() {
  constexpr int kHalf = 1 << 30;
  if (!mallopt(M_MMAP_THRESHOLD, kHalf) || !mallopt(M_TRIM_THRESHOLD, kHalf))
    throw std::runtime_error("retain_memory: mallopt refused; is another allocator than glibc's preloaded?");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Tensor-free control and introspection of the CPU op library.";
  m.def("cpu_features", features, "What cpuid and the OS's XSAVE state say.");
  m.def("available_isas", available_isas, "The tiers that this CPU can run, lowest first.");
  m.def("active_isa", [] { return pbm::isa_name(pbm::active_isa()); }, "The tier in force.");
  m.def("force_isa", force_isa, py::arg("isa"), "Use this tier from now on; None: the best one.");
  m.def("last_kernel", [] { return pbm::last_kernel(); }, "The kernel that ran last and its tier.");
  m.def("num_threads", pbm::num_threads, "Threads of torch's pool, on which every op runs.");
  m.def("retain_memory", retain_memory, "From now on the process keeps freed memory for reuse.");
  m.def("build_info", build_info, "Compiler, flags, CUDA architectures, commit, torch ABI target.");
  m.def("conv_algorithm", pbm::conv_algorithm, py::arg("input"), py::arg("weight"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("bf16"), py::arg("exact"),
        py::arg("channels_last") = true,
        "The integer of the algorithm that the convolution ops choose for these shapes.");
  m.def(
      "measure_peak",
      [](const std::string& kind, double seconds) {
        const int k = peak_kind(kind);
        check_seconds(seconds);
        py::gil_scoped_release release;
        return pbm::measure_peak(k, seconds);
      },
      py::arg("kind"), py::arg("seconds"), "Operations a second of the calling thread, from registers.");
  m.def(
      "measure_read_bandwidth",
      [](size_t bytes, double seconds) {
        check_seconds(seconds);
        py::gil_scoped_release release;
        return pbm::measure_read_bandwidth(bytes, seconds);
      },
      py::arg("bytes"), py::arg("seconds"), "Bytes a second that the calling thread reads from a buffer of `bytes`.");
}
