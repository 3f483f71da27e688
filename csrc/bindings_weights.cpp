// The Python face of the decoders: raw pointers in, the GIL released around the work.
#include "bindings_weights.h"

#include "cpu/weights.h"
#ifdef LRTT_WITH_CUDA
#  include "cuda/weights.h"
#endif

namespace py = pybind11;
using namespace lrtt;

namespace {

// (type, is_bfloat, row_count, row_blocks, blocks, out, out_stride, rows)
blocks::Job decode_job(const py::tuple& t) {
  return {t[0].cast<int>(),
          t[1].cast<bool>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          reinterpret_cast<const uint8_t*>(t[4].cast<uintptr_t>()),
          reinterpret_cast<void*>(t[5].cast<uintptr_t>()),
          t[6].cast<int64_t>(),
          reinterpret_cast<const int64_t*>(t[7].cast<uintptr_t>())};
}

py::dict decoders() {
  py::dict sizes;
  for (int type = 0; type < 64; ++type)
    blocks::with_type(type, [&](auto t) {
      using T = decltype(t);
      sizes[py::int_(type)] = py::make_tuple(int(T::kSize), int(T::kBytes));
    });
  sizes[py::int_(int(blocks::kF32))] = py::make_tuple(1, 4);
  sizes[py::int_(int(blocks::kF16))] = py::make_tuple(1, 2);
  sizes[py::int_(int(blocks::kBF16))] = py::make_tuple(1, 2);
  return sizes;
}

}  // namespace

void bind_weights(py::module_& m) {
  m.def("decoders", &decoders, "GGML type number -> (elements, bytes) of a block, of the types that the core decodes.");
  m.def("dequantize_cpu", [](const py::tuple& t, int threads) {
    const blocks::Job job = decode_job(t);
    py::gil_scoped_release unlocked;
    cpu::dequantize(job, threads);
  });
  m.def("skip_strings", [](const py::buffer& window, uint64_t at, int64_t count) {
    const py::buffer_info info = window.request();
    const uint64_t size = uint64_t(info.size) * uint64_t(info.itemsize);
    if (at > size) throw py::value_error("skip_strings: at must lie in the window");
    const int64_t walked = cpu::skip_strings(static_cast<const uint8_t*>(info.ptr), size, at, count);
    return py::make_tuple(walked, at);
  });
#ifdef LRTT_WITH_CUDA
  m.def("dequantize_cuda", [](const py::tuple& t, uintptr_t stream) {
    const blocks::Job job = decode_job(t);
    py::gil_scoped_release unlocked;
    cuda::dequantize(job, reinterpret_cast<void*>(stream));
  });
#endif
}
