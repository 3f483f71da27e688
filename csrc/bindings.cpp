// The Python face of the core: raw pointers, sizes and a stream handle in; nothing of torch, no
// allocation on the device, no synchronisation, the GIL released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings_weights.h"
#include "cpu/barrier.h"
#include "cpu/kernels.h"
#ifdef LRTT_WITH_CUDA
#  include "cuda/kernels.h"
#endif

void bind_io(pybind11::module_& m);        // bindings_io.cpp
void bind_hopfield(pybind11::module_& m);  // bindings_hopfield.cpp

namespace py = pybind11;
using namespace lrtt;

namespace {

template <class T>
T* pointer(const py::handle& h) {
  return reinterpret_cast<T*>(h.cast<uintptr_t>());
}

// (w, m, n, x, x_stride_sample, x_stride_element, x_type, d, d_stride_sample, d_stride_element, d_type, samples,
//  first_sample, eta, state, counts, hyper, array, cells, x_top, d_top)
PulseJob pulse_job(const py::tuple& t) {
  PulseJob j{};
  j.w = pointer<float>(t[0]);
  j.m = t[1].cast<int>();
  j.n = t[2].cast<int>();
  j.x = Operand{pointer<const void>(t[3]), t[4].cast<int64_t>(), t[5].cast<int64_t>(), t[6].cast<int>(), 0};
  j.d = Operand{pointer<const void>(t[7]), t[8].cast<int64_t>(), t[9].cast<int64_t>(), t[10].cast<int>(), 0};
  j.samples = t[11].cast<int64_t>();
  j.first_sample = t[12].cast<int64_t>();
  j.eta = pointer<const float>(t[13]);
  j.state = pointer<const int64_t>(t[14]);
  j.counts = pointer<int64_t>(t[15]);
  const double* hyper = pointer<const double>(t[16]);
  j.array = t[17].cast<int>();
  j.pulse = update_pulse(tile_params(hyper));
  j.device = device_params(hyper, j.array == kC);
  j.cells = pointer<float>(t[18]);
  j.x_top = pointer<const uint32_t>(t[19]);
  j.d_top = pointer<const uint32_t>(t[20]);
  if (int(j.device.kind) == kIdealFloat)
    throw py::value_error("lrtt::pulsed_update_: array " + std::to_string(j.array) +
                          " must have a device to take pulses; give the config a " +
                          (j.array == kC ? "visible_device" : "fast_device"));
  if (j.pulse.type >= kNone)
    throw py::value_error(
        "lrtt::pulsed_update_: pulse_type must be a pulsed one, got none or none_with_device; those are "
        "digital_update_");
  return j;
}

// (a, b, c, d, k, r, is_double, increment, state, counts, hyper, cells_a, cells_b, cells_c)
TransferJob transfer_job(const py::tuple& t) {
  TransferJob j{};
  j.a = pointer<void>(t[0]);
  j.b = pointer<void>(t[1]);
  j.c = pointer<void>(t[2]);
  j.d = t[3].cast<int>();
  j.k = t[4].cast<int>();
  j.r = t[5].cast<int>();
  j.is_double = t[6].cast<bool>();
  j.increment = t[7].cast<int64_t>();
  j.state = pointer<int64_t>(t[8]);
  j.counts = pointer<int64_t>(t[9]);
  const double* hyper = pointer<const double>(t[10]);
  j.tile = tile_params(hyper);
  j.fast = device_params(hyper, false);
  j.visible = device_params(hyper, true);
  j.cells_a = pointer<float>(t[11]);
  j.cells_b = pointer<float>(t[12]);
  j.cells_c = pointer<float>(t[13]);
  return j;
}

// (w, grad, size, is_double, scale, lr, state, counts)
cpu::DigitalJob digital_job(const py::tuple& t) {
  return {pointer<void>(t[0]), pointer<const void>(t[1]),   t[2].cast<int64_t>(),         t[3].cast<bool>(),
          t[4].cast<double>(), pointer<const double>(t[5]), pointer<const int64_t>(t[6]), pointer<int64_t>(t[7])};
}

// (eta, grad, first, size, scale, lr)
cpu::ScaleJob scale_job(const py::tuple& t) {
  return {pointer<float>(t[0]), pointer<const float>(t[1]), pointer<const float>(t[2]),
          t[3].cast<int64_t>(), t[4].cast<double>(),        pointer<const double>(t[5])};
}

// (state, hyper, array, m, n, w, cells)
cpu::CellsJob cells_job(const py::tuple& t) {
  const int array = t[2].cast<int>();
  return {pointer<const int64_t>(t[0]),
          device_params(pointer<const double>(t[1]), (array & ~int(kMinus)) == kC),
          array,
          t[3].cast<int>(),
          t[4].cast<int>(),
          pointer<float>(t[5]),
          pointer<float>(t[6])};
}

// (first, last, share, number)
cpu::ResetRange reset_range(const py::tuple& t) {
  return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<float>(), t[3].cast<uint32_t>()};
}

// The pointers of a SegmentCall live as long as this.
struct Segments {
  SegmentCall call;
  std::vector<std::vector<const void*>> slots;
  std::vector<std::vector<void*>> out;
};

// (jobs: [(slots, out, size, is_double)], program: [(adds, emit)], weights, scale, stats, redo)
Segments segments(const py::list& jobs, const py::list& program, uintptr_t weights, uintptr_t scale, uintptr_t stats,
                  bool redo) {
  Segments s{};
  s.call.weights = reinterpret_cast<const double*>(weights);
  s.call.scale = reinterpret_cast<const double*>(scale);
  s.call.stats = reinterpret_cast<double*>(stats);
  s.call.redo = redo;
  for (const py::handle& item : program) {
    const py::tuple step = item.cast<py::tuple>();
    s.call.program.push_back({step[0].cast<int>(), step[1].cast<int>()});
  }
  for (const py::handle& item : jobs) {
    const py::tuple t = item.cast<py::tuple>();
    s.slots.emplace_back();
    s.out.emplace_back();
    for (const py::handle& h : t[0]) s.slots.back().push_back(pointer<const void>(h));
    for (const py::handle& h : t[1]) s.out.back().push_back(pointer<void>(h));
    // Inner vectors keep their memory when the outer ones grow.
    s.call.jobs.push_back({s.slots.back().data(), s.out.back().data(), t[2].cast<int64_t>(), t[3].cast<bool>(), 0});
  }
  return s;
}

template <class Job>
std::vector<Job> all(const py::list& list, Job (*parse)(const py::tuple&)) {
  std::vector<Job> jobs;
  jobs.reserve(list.size());
  for (const py::handle& item : list) jobs.push_back(parse(item.cast<py::tuple>()));
  return jobs;
}

using release = py::call_guard<py::gil_scoped_release>;

// Parses under the GIL, then runs without it.
template <class Job, class Run>
void launch(const py::list& list, Job (*parse)(const py::tuple&), Run run) {
  const std::vector<Job> jobs = all(list, parse);
  py::gil_scoped_release unlocked;
  run(jobs);
}

py::dict layout() {
  py::dict out;
  py::list tile, device, counts, io;
#define LRTT_FIELD(name) tile.append(#name);
  LRTT_TILE_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
#define LRTT_FIELD(name) device.append(#name);
  LRTT_DEVICE_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
#define LRTT_FIELD(name) counts.append(#name);
  LRTT_COUNTS(LRTT_FIELD)
#undef LRTT_FIELD
#define LRTT_FIELD(name) io.append(#name);
  LRTT_IO_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
  out["io"] = io;
  out["read_lanes"] = kReadLanes;
  out["tile"] = tile;
  out["device"] = device;
  out["counts"] = counts;
  out["state"] = py::make_tuple("key", "step", "counter", "cycle");
  out["cell_numbers"] = kCellNumbers;
  out["fixed_point"] = kFixedPoint;
  out["block_samples"] = kBlockSamples;
  out["segment_depth"] = kSegmentDepth;
  out["segment_block"] = kSegmentBlock;
  out["segment_lanes"] = py::make_tuple(kSegmentLanes, kSegmentFinalLanes);
  out["short_slots"] = kShortSlots;
  out["most_slots"] = kMostSlots;
  return out;
}

py::dict build_info() {
  py::dict info;
#ifdef LRTT_WITH_CUDA
  info["with_cuda"] = true;
  info["cuda_architectures"] = LRTT_CUDA_ARCHITECTURES;
  info["cuda_runtime"] = cuda::runtime_version();
  info["cuda_driver"] = cuda::driver_version();
#else
  info["with_cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(NDEBUG) && defined(__OPTIMIZE__)
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  info["cpu_instructions"] = cpu::instruction_set();
  info["compiler"] = LRTT_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lightning_lrtt; see lightning_lrtt.ops for the operators built on them.";
  m.def("layout", &layout, "Field names of the packed arrays, in order.");
  m.def("build_info", &build_info, "What was compiled in.");

  // Each operator on a list of jobs: NAME_cpu_bytes and NAME_cuda_bytes say how much scratch it needs, NAME_cpu takes
  // (jobs, [force,] scratch, threads) and NAME_cuda (jobs, [force,] scratch, stream).
  const auto scratch = [](uintptr_t p) { return reinterpret_cast<void*>(p); };
  m.def("pulsed_update_cpu_bytes", [](const py::list& list) {
    size_t most = 0;
    for (const PulseJob& j : all(list, pulse_job)) most = std::max(most, cpu::workspace_bytes(j.m, j.n, j.pulse));
    return most;
  });
  m.def("transfer_cpu_bytes", [](const py::list& list) {
    size_t most = 0;
    for (const TransferJob& j : all(list, transfer_job))
      if (int(j.tile.transfer_mode) != kDigital)
        most = std::max(most, cpu::workspace_bytes(j.d, j.k, transfer_pulse(j.tile)));
    return most;
  });
  for (const char* name : {"reinit_cpu_bytes", "digital_update_cpu_bytes", "pulse_scale_cpu_bytes", "relax_cpu_bytes"})
    m.def(name, [](const py::list&) { return 0; });
  m.def("pulsed_update_cpu", [=](const py::list& jobs, uintptr_t workspace, int threads) {
    launch(jobs, pulse_job, [&](auto& j) { cpu::pulsed_update(j, scratch(workspace), threads); });
  });
  m.def("transfer_cpu", [=](const py::list& jobs, bool force, uintptr_t workspace, int threads) {
    launch(jobs, transfer_job, [&](auto& j) { cpu::transfer(j, force, scratch(workspace), threads); });
  });
  m.def("reinit_cpu", [](const py::list& jobs, uintptr_t, int threads) {
    launch(jobs, transfer_job, [&](auto& j) { cpu::reinit(j, threads); });
  });
  m.def("digital_update_cpu", [](const py::list& jobs, uintptr_t, int threads) {
    launch(jobs, digital_job, [&](auto& j) { cpu::digital_update(j, threads); });
  });
  m.def("pulse_scale_cpu", [](const py::list& jobs, uintptr_t, int threads) {
    launch(jobs, scale_job, [&](auto& j) { cpu::pulse_scale(j, threads); });
  });
  m.def("relax_cpu", [](const py::list& jobs, uintptr_t, int threads) {
    launch(jobs, cells_job, [&](auto& j) { cpu::relax(j, threads); });
  });
  m.def("segment_sum_cpu_bytes",
        [](const py::list& jobs, const py::list& program, uintptr_t w, uintptr_t scale, uintptr_t stats, bool redo) {
          return cpu::workspace_bytes(segments(jobs, program, w, scale, stats, redo).call);
        });
  m.def("segment_sum_cpu", [=](const py::list& jobs, const py::list& program, uintptr_t w, uintptr_t scale,
                               uintptr_t stats, bool redo, uintptr_t workspace, int threads) {
    const Segments s = segments(jobs, program, w, scale, stats, redo);
    py::gil_scoped_release unlocked;
    cpu::segment_sum(s.call, scratch(workspace), threads);
  });
  m.def("draw_cells_cpu", [](const py::tuple& job, uintptr_t out, int threads) {
    cpu::draw_cells(cells_job(job), reinterpret_cast<float*>(out), threads);
  });
  m.def("clip_cpu", [](const py::tuple& job, bool write, uintptr_t at_bound, int threads) {
    cpu::clip(cells_job(job), write, reinterpret_cast<int64_t*>(at_bound), threads);
  });
  m.def("reset_cells_cpu", [](const py::tuple& job, const py::tuple& range, int threads) {
    cpu::reset(cells_job(job), reset_range(range), threads);
  });

#ifdef LRTT_WITH_CUDA
  m.def("pulsed_update_cuda_bytes", [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, pulse_job)); });
  m.def("transfer_cuda_bytes", [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, transfer_job)); });
  m.def("reinit_cuda_bytes", [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, transfer_job)); });
  m.def("digital_update_cuda_bytes",
        [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, digital_job)); });
  m.def("pulse_scale_cuda_bytes", [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, scale_job)); });
  m.def("pulsed_update_cuda", [=](const py::list& jobs, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, pulse_job, [&](auto& j) { cuda::pulsed_update(j, scratch(workspace), scratch(stream)); });
  });
  m.def("transfer_cuda", [=](const py::list& jobs, bool force, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, transfer_job, [&](auto& j) { cuda::transfer(j, force, scratch(workspace), scratch(stream)); });
  });
  m.def("reinit_cuda", [=](const py::list& jobs, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, transfer_job, [&](auto& j) { cuda::reinit(j, scratch(workspace), scratch(stream)); });
  });
  m.def("digital_update_cuda", [=](const py::list& jobs, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, digital_job, [&](auto& j) { cuda::digital_update(j, scratch(workspace), scratch(stream)); });
  });
  m.def("pulse_scale_cuda", [=](const py::list& jobs, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, scale_job, [&](auto& j) { cuda::pulse_scale(j, scratch(workspace), scratch(stream)); });
  });
  m.def("relax_cuda_bytes", [](const py::list& jobs) { return cuda::workspace_bytes(all(jobs, cells_job)); });
  m.def("relax_cuda", [=](const py::list& jobs, uintptr_t workspace, uintptr_t stream) {
    launch(jobs, cells_job, [&](auto& j) { cuda::relax(j, scratch(workspace), scratch(stream)); });
  });
  m.def("segment_sum_cuda_bytes",
        [](const py::list& jobs, const py::list& program, uintptr_t w, uintptr_t scale, uintptr_t stats, bool redo) {
          return cuda::workspace_bytes(segments(jobs, program, w, scale, stats, redo).call);
        });
  m.def("segment_sum_cuda", [=](const py::list& jobs, const py::list& program, uintptr_t w, uintptr_t scale,
                                uintptr_t stats, bool redo, uintptr_t workspace, uintptr_t stream) {
    const Segments s = segments(jobs, program, w, scale, stats, redo);
    py::gil_scoped_release unlocked;
    cuda::segment_sum(s.call, scratch(workspace), scratch(stream));
  });
  m.def("merge_cuda", [=](uintptr_t c, uintptr_t a, uintptr_t b, uintptr_t out, uintptr_t a_t, uintptr_t b_out,
                          int64_t d, int k, int r, float alpha, int type, uintptr_t stream) {
    const auto floats = [](uintptr_t p) { return reinterpret_cast<const float*>(p); };
    cuda::merge({floats(c), floats(a), floats(b), scratch(out), scratch(a_t), scratch(b_out), d, k, r, alpha, type},
                scratch(stream));
  });
  // layer: (c, a, b, d, k, r, alpha)
  const auto small_layer = [](const py::tuple& t) {
    const auto floats = [&](size_t i) { return reinterpret_cast<const float*>(t[i].cast<uintptr_t>()); };
    return cuda::SmallLayer{floats(0),        floats(1),        floats(2),         t[3].cast<int>(),
                            t[4].cast<int>(), t[5].cast<int>(), t[6].cast<float>()};
  };
  m.def("small_forward_cuda", [=](const py::tuple& layer, uintptr_t x, uintptr_t bias, uintptr_t y, uintptr_t z,
                                  uintptr_t top, int64_t x_stride, int n, uintptr_t stream) {
    const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
    cuda::forward({small_layer(layer), floats(x), floats(bias), floats(y), floats(z), reinterpret_cast<uint32_t*>(top),
                   x_stride, n},
                  scratch(stream));
  });
  m.def("small_backward_cuda", [=](const py::tuple& layer, const py::tuple& pointers, uintptr_t top,
                                   int64_t grad_stride, int64_t x_stride, int n, uintptr_t stream) {
    const auto floats = [&](size_t i) { return reinterpret_cast<float*>(pointers[i].cast<uintptr_t>()); };
    cuda::backward({small_layer(layer), floats(0), floats(1), floats(2), floats(3), floats(4), floats(5), floats(6),
                    floats(7), floats(8), floats(9), reinterpret_cast<uint32_t*>(top), grad_stride, x_stride, n},
                   scratch(stream));
  });
  m.def("project_cuda",
        [=](uintptr_t x, uintptr_t w, uintptr_t narrow, uintptr_t z, uintptr_t top, int64_t n, int64_t x_stride,
            int64_t narrow_stride, int64_t z_stride, int k, int r, bool wide, bool bfloat, uintptr_t stream) {
          cuda::project({scratch(x), scratch(w), scratch(narrow), scratch(z), reinterpret_cast<uint32_t*>(top), n,
                         x_stride, narrow_stride, z_stride, k, r, wide, bfloat},
                        scratch(stream));
        });
  m.def("draw_cells_cuda", [=](const py::tuple& job, uintptr_t out, uintptr_t stream) {
    cuda::draw_cells(cells_job(job), reinterpret_cast<float*>(out), scratch(stream));
  });
  m.def("clip_cuda", [=](const py::tuple& job, bool write, uintptr_t at_bound, uintptr_t stream) {
    cuda::clip(cells_job(job), write, reinterpret_cast<int64_t*>(at_bound), scratch(stream));
  });
  m.def("reset_cells_cuda", [=](const py::tuple& job, const py::tuple& range, uintptr_t stream) {
    cuda::reset(cells_job(job), reset_range(range), scratch(stream));
  });
#endif

  bind_io(m);
  bind_hopfield(m);
  bind_weights(m);
  // A barrier in memory that processes share; the caller maps `barrier_bytes` of it.
  const auto barrier = [](uintptr_t p) { return reinterpret_cast<cpu::Barrier*>(p); };
  m.attr("barrier_bytes") = sizeof(cpu::Barrier);
  m.attr("barrier_workers") = cpu::kBarrierWorkers;
  m.def("barrier_init", [=](uintptr_t p, int workers) { cpu::barrier_init(barrier(p), workers); });
  m.def("barrier_arrive", [=](uintptr_t p, int rank) { return cpu::barrier_arrive(barrier(p), rank); });
  m.def(
      "barrier_wait", [=](uintptr_t p, uint32_t meeting, int ms) { return cpu::barrier_wait(barrier(p), meeting, ms); },
      release());
  m.def("barrier_fail", [=](uintptr_t p, int rank) { cpu::barrier_fail(barrier(p), rank); });
  m.def("barrier_failed", [=](uintptr_t p) { return int(barrier(p)->failed.load()) - 1; });
  m.def("barrier_missing", [=](uintptr_t p, uint32_t meeting) {
    py::list missing;
    for (uint32_t r = 0; r < barrier(p)->size.load(); ++r)
      if (int32_t(barrier(p)->stamp[r].load() - meeting) < 0) missing.append(r);
    return missing;
  });

  // Single numbers of the shared header, for tests and plots.
  m.def("philox", [](uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const Words w = philox(key, c0, c1, c2, c3);
    return py::make_tuple(w.w[0], w.w[1], w.w[2], w.w[3]);
  });
  m.def("normal", [](uint32_t word) { return normal(word); });
  m.def("exp", [](float z) { return exp_(z); });
}
