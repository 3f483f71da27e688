// Converters of analog reads (io.h): the Python face, under the rules of bindings.cpp.
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

// (x, stride, x_type, u_type, samples, first_sample, n, array, round, ticket, state, pending, u, per, io)
InputJob input_job(const py::tuple& t) {
  InputJob j{};
  j.x = pointer<const void>(t[0]);
  j.stride = t[1].cast<int64_t>();
  j.x_type = t[2].cast<int>();
  j.u_type = t[3].cast<int>();
  j.samples = t[4].cast<int64_t>();
  j.first_sample = t[5].cast<int64_t>();
  j.n = t[6].cast<int>();
  j.array = t[7].cast<int>();
  j.round = t[8].cast<int>();
  j.ticket = pointer<const int64_t>(t[9]);
  j.state = pointer<const int64_t>(t[10]);
  j.pending = pointer<const int32_t>(t[11]);
  j.u = pointer<void>(t[12]);
  j.per = pointer<float>(t[13]);
  j.io = io_numbers(pointer<const double>(t[14]));
  return j;
}

// (y, acc, per, samples, first_sample, n, array, round, ticket, state, pending, clipped, io)
OutputJob output_job(const py::tuple& t) {
  OutputJob j{};
  j.y = pointer<float>(t[0]);
  j.acc = pointer<const float>(t[1]);
  j.per = pointer<const float>(t[2]);
  j.samples = t[3].cast<int64_t>();
  j.first_sample = t[4].cast<int64_t>();
  j.n = t[5].cast<int>();
  j.array = t[6].cast<int>();
  j.round = t[7].cast<int>();
  j.ticket = pointer<const int64_t>(t[8]);
  j.state = pointer<const int64_t>(t[9]);
  j.pending = pointer<const int32_t>(t[10]);
  j.clipped = pointer<int32_t>(t[11]);
  j.io = io_numbers(pointer<const double>(t[12]));
  return j;
}

}  // namespace

void bind_io(py::module_& m) {
  m.def("io_ticket_cpu", [](uintptr_t reads, int mode, uintptr_t ticket, int) {
    cpu::take_ticket(reinterpret_cast<int64_t*>(reads), mode, reinterpret_cast<int64_t*>(ticket));
  });
  m.def("io_input_cpu", [](const py::tuple& t, int threads) {
    const InputJob job = input_job(t);
    py::gil_scoped_release unlocked;
    cpu::read_input(job, threads);
  });
  m.def("io_output_cpu", [](const py::tuple& t, int threads) {
    const OutputJob job = output_job(t);
    py::gil_scoped_release unlocked;
    cpu::read_output(job, threads);
  });
#ifdef LRTT_WITH_CUDA
  m.def("io_ticket_cuda", [](uintptr_t reads, int mode, uintptr_t ticket, uintptr_t stream) {
    cuda::take_ticket(reinterpret_cast<int64_t*>(reads), mode, reinterpret_cast<int64_t*>(ticket),
                      reinterpret_cast<void*>(stream));
  });
  m.def("io_input_cuda", [](const py::tuple& t, uintptr_t stream) {
    const InputJob job = input_job(t);
    py::gil_scoped_release unlocked;
    cuda::read_input(job, reinterpret_cast<void*>(stream));
  });
  m.def("io_output_cuda", [](const py::tuple& t, uintptr_t stream) {
    const OutputJob job = output_job(t);
    py::gil_scoped_release unlocked;
    cuda::read_output(job, reinterpret_cast<void*>(stream));
  });
  // (u, u_type, w, pending, acc, samples, n, d)
  m.def("io_product_cuda", [](const py::tuple& t, uintptr_t stream) {
    const ProductJob job{
        pointer<const void>(t[0]), t[1].cast<int>(),     pointer<const float>(t[2]), pointer<const int32_t>(t[3]),
        pointer<float>(t[4]),      t[5].cast<int64_t>(), t[6].cast<int>(),           t[7].cast<int>()};
    py::gil_scoped_release unlocked;
    cuda::read_product(job, reinterpret_cast<void*>(stream));
  });
#endif
}
