// Windows of Hopfield networks (hopfield.h): the Python face, under the rules of bindings.cpp.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#ifdef LRTT_WITH_CUDA
#  include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace lrtt;

namespace {

template <class T>
T* pointer(const py::handle& h) {
  return reinterpret_cast<T*>(h.cast<uintptr_t>());
}

// (matrix, odd_drive, even_drive, start_odd, start_even, new_odd, new_even, spare_odd, spare_even, target, beta,
//  beta_stride, samples, odd, even, steps, in_turn, outputs, outputs_are_odd, rho, output_rho, nudge)
HopfieldJob hopfield_job(const py::tuple& t) {
  HopfieldJob j{};
  j.matrix = pointer<const float>(t[0]);
  j.odd_drive = pointer<const float>(t[1]);
  j.even_drive = pointer<const float>(t[2]);
  j.start_odd = pointer<const float>(t[3]);
  j.start_even = pointer<const float>(t[4]);
  j.new_odd = pointer<float>(t[5]);
  j.new_even = pointer<float>(t[6]);
  j.spare_odd = pointer<float>(t[7]);
  j.spare_even = pointer<float>(t[8]);
  j.target = pointer<const float>(t[9]);
  j.beta = pointer<const float>(t[10]);
  j.beta_stride = t[11].cast<int64_t>();
  j.samples = t[12].cast<int64_t>();
  j.odd = t[13].cast<int>();
  j.even = t[14].cast<int>();
  j.steps = t[15].cast<int>();
  j.in_turn = t[16].cast<int>();
  j.outputs = t[17].cast<int>();
  j.outputs_are_odd = t[18].cast<int>();
  j.rho = t[19].cast<int>();
  j.output_rho = t[20].cast<int>();
  j.nudge = t[21].cast<int>();
  return j;
}

}  // namespace

void bind_hopfield(py::module_& m) {
  m.def("hopfield_window_cpu_bytes", [](const py::tuple& t) { return cpu::hopfield_bytes(hopfield_job(t)); });
  m.def("hopfield_window_cpu", [](const py::tuple& t, uintptr_t workspace, int threads) {
    const HopfieldJob job = hopfield_job(t);
    py::gil_scoped_release unlocked;
    cpu::hopfield_window(job, reinterpret_cast<void*>(workspace), threads);
  });
#ifdef LRTT_WITH_CUDA
  m.def("hopfield_fits_cuda", &cuda::hopfield_fits);
  m.def("hopfield_window_cuda_bytes", [](const py::tuple& t) { return cuda::hopfield_bytes(hopfield_job(t).samples); });
  m.def("hopfield_window_cuda", [](const py::tuple& t, uintptr_t workspace, uintptr_t stream) {
    const HopfieldJob job = hopfield_job(t);
    py::gil_scoped_release unlocked;
    cuda::hopfield_window(job, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
  });
#endif
}
