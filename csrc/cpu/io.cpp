// Converters on the CPU: samples over threads, the loops of io_lanes.cpp inside.
#include "kernels.h"
#include "lanes.h"

namespace lrtt {

extern const IoKernels io_kernels_base;
#ifdef LRTT_X86_CLONES
extern const IoKernels io_kernels_v3, io_kernels_v4;
#endif

namespace cpu {
namespace {

// The set that lane_kernels() chose.
const IoKernels& io_kernels() {
#ifdef LRTT_X86_CLONES
  for (const IoKernels* kernels : {&io_kernels_v4, &io_kernels_v3})
    if (strcmp(kernels->name, lane_kernels().name) == 0) return *kernels;
#endif
  return io_kernels_base;
}

template <class Job>
ReadId id_of(const Job& job, int64_t sample) {
  return ReadId{uint64_t(job.state[kKey]), uint32_t(job.first_sample + sample), uint32_t(*job.ticket),
                uint32_t(job.array), uint32_t(job.round)};
}

constexpr int64_t kWorthAThread = 16384;  // elements

}  // namespace

void take_ticket(int64_t* reads, int mode, int64_t* ticket) { *ticket = 2 * reads[mode]++ + mode; }

void read_input(const InputJob& job, int threads) {
  const IoKernels& kernels = io_kernels();
#pragma omp parallel for num_threads(threads) if (threads > 1 && job.samples * job.n > kWorthAThread)
  for (int64_t s = 0; s < job.samples; ++s) {
    float* u = static_cast<float*>(job.u) + s * job.n;
    float *alpha = job.per + s, *sigma = job.per + job.samples + s;
    if (job.pending != nullptr && job.pending[s] == 0) {
      memset(u, 0, sizeof(float) * size_t(job.n));
      *alpha = *sigma = 0.0f;
      continue;
    }
    kernels.input(job.io, static_cast<const float*>(job.x) + s * job.stride, job.n, id_of(job, s), u, alpha, sigma);
  }
}

void read_output(const OutputJob& job, int threads) {
  const IoKernels& kernels = io_kernels();
#pragma omp parallel for num_threads(threads) if (threads > 1 && job.samples * job.n > kWorthAThread)
  for (int64_t s = 0; s < job.samples; ++s) {
    if (job.pending != nullptr && job.pending[s] == 0) {
      job.clipped[s] = 0;
      continue;
    }
    job.clipped[s] = kernels.output(job.io, job.acc + s * job.n, job.n, id_of(job, s), job.per[s],
                                    job.per[job.samples + s], job.y + s * job.n);
  }
}

}  // namespace cpu
}  // namespace lrtt
