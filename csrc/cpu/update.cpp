// Pulsed and digital updates on the CPU: planning, memory and threads around the loops of lanes.cpp.
#include "kernels.h"
#include "lanes.h"
#include "pulses.h"

namespace lrtt {

extern const LaneKernels lane_kernels_base;
#ifdef LRTT_X86_CLONES
extern const LaneKernels lane_kernels_v3, lane_kernels_v4;
#endif

const LaneKernels& lane_kernels() {
#ifdef LRTT_X86_CLONES
  static const LaneKernels& best = [&]() -> const LaneKernels& {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      return lane_kernels_v4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      return lane_kernels_v3;
    return lane_kernels_base;
  }();
  return best;
#else
  return lane_kernels_base;
#endif
}

namespace cpu {

const char* instruction_set() { return lane_kernels().name; }

namespace {
int64_t padded(int64_t elements) { return (elements + kChunk - 1) / kChunk * kChunk; }
}  // namespace

size_t workspace_bytes(int64_t m, int64_t n, const PulseParams& pulse) {
  const int rows = form_of(pulse) == kCounted ? block_samples(pulse) : 2 * block_words(pulse);
  return size_t(rows) * sizeof(uint32_t) * size_t(padded(m) + padded(n)) + 64;
}

void apply_block(const PulseJob& job, BlockPlan& plan, void* workspace, int threads) {
  int longest = 0, used = 0;
  for (int s = 0; s < plan.samples; ++s) {
    longest = plan.train[s].bl > longest ? plan.train[s].bl : longest;
    used = plan.train[s].bl > 0 ? s + 1 : used;
  }
  if (longest == 0) return;
  plan.width = slot_width(longest);
  plan.words = (used * plan.width + 31) / 32;

  auto* memory = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t(63));
  Stream x{memory, nullptr, padded(job.n)}, d{nullptr, nullptr, padded(job.m)};
  const bool counted = form_of(job.pulse) == kCounted;  // no neg
  x.neg = x.bits + (counted ? plan.samples : plan.words) * x.ld;
  d.bits = x.neg + (counted ? 0 : plan.words * x.ld);
  d.neg = d.bits + plan.words * d.ld;

  const LaneKernels& k = lane_kernels();
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t step = uint32_t(job.state[kStep]);
  const int64_t x_chunks = x.ld / kChunk, chunks = x_chunks + d.ld / kChunk;
  const int64_t longer = job.n >= job.m ? job.n : job.m, shorter = job.n >= job.m ? job.m : job.n;
  const int64_t groups = (longer + kLanes - 1) / kLanes;
  int64_t count = 0, lost = 0;
  // Below this many word visits waking a second thread costs more than it saves.
  const bool parallel = threads > 1 && groups * shorter * plan.words > 4096;
#pragma omp parallel num_threads(threads) if (parallel) reduction(+ : count, lost)
  {
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < chunks; ++c) {
      if (c < x_chunks) {
        k.generate(job.x, job.n, c * kChunk, true, job.pulse, plan, key, step, uint32_t(job.array), x);
      } else {
        k.generate(job.d, job.m, (c - x_chunks) * kChunk, false, job.pulse, plan, key, step, uint32_t(job.array), d);
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t o = 0; o < shorter; ++o) count += k.pulses(job, plan, g * kLanes, o, x, d, &lost);
  }
  job.counts[k_pulses_a + job.array] += count;
  if (job.array == kC) job.counts[k_lost] += lost;
}

void count_nonfinite(int64_t* counts, int64_t step, int64_t samples) {
  if (samples == 0) return;
  counts[k_nonfinite] += samples;
  if (counts[k_first_bad_step] < 0) counts[k_first_bad_step] = step;
}

void pulsed_update(const std::vector<PulseJob>& jobs, void* workspace, int threads) {
  const LaneKernels& k = lane_kernels();
  BlockPlan plan;
  for (const PulseJob& job : jobs) {
    int64_t bad = 0;
    const int full = block_samples(job.pulse);
    for (int64_t s0 = 0; s0 < job.samples; s0 += full) {
      plan.samples = int(job.samples - s0 < full ? job.samples - s0 : full);
      plan.first_sample = job.first_sample + s0;
      plan.eta_sign = *job.eta < 0.0f ? -1.0f : 1.0f;
      const bool parallel = threads > 1 && int64_t(plan.samples) * (job.m + job.n) > 65536;
#pragma omp parallel for num_threads(threads) if (parallel) reduction(+ : bad)
      for (int s = 0; s < plan.samples; ++s) {
        const uint32_t xm = k.largest(static_cast<const float*>(job.x.p) + (s0 + s) * job.x.ss, job.n, job.x.es);
        const uint32_t dm = k.largest(static_cast<const float*>(job.d.p) + (s0 + s) * job.d.ss, job.m, job.d.es);
        bool finite;
        plan.row[s] = s;
        plan.train[s] = plan_train(*job.eta, xm, dm, job.device.granularity, job.pulse, finite);
        bad += !finite;
      }
      PulseJob block = job;
      block.x.p = static_cast<const float*>(job.x.p) + s0 * job.x.ss;
      block.d.p = static_cast<const float*>(job.d.p) + s0 * job.d.ss;
      apply_block(block, plan, workspace, threads);
    }
    count_nonfinite(job.counts, job.state[kStep], bad);
  }
}

namespace {

template <class T>
bool all_finite(const T* g, int64_t size, int threads) {
  int bad = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && size > 65536) reduction(| : bad)
  for (int64_t i = 0; i < size; ++i) bad |= !(g[i] - g[i] == T(0));
  return bad == 0;
}

template <class T>
void descend(const DigitalJob& job, int threads) {
  const T* g = static_cast<const T*>(job.grad);
  T* w = static_cast<T*>(job.w);
  if (!all_finite(g, job.size, threads)) return count_nonfinite(job.counts, job.state[kStep], 1);
  const T rate = T(*job.lr * job.scale);
#pragma omp parallel for num_threads(threads) if (threads > 1 && job.size > 65536)
  for (int64_t i = 0; i < job.size; ++i) w[i] -= rate * g[i];
}

}  // namespace

void digital_update(const std::vector<DigitalJob>& jobs, int threads) {
  for (const DigitalJob& job : jobs) job.is_double ? descend<double>(job, threads) : descend<float>(job, threads);
}

void pulse_scale(const std::vector<ScaleJob>& jobs, int threads) {
  const int64_t count = int64_t(jobs.size());
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 1) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    const ScaleJob& job = jobs[size_t(i)];
    double cross[kScaleLanes] = {}, square[kScaleLanes] = {};
    for (int64_t e = 0; e < job.size; ++e) {
      const double f = job.first[e];
      cross[e % kScaleLanes] += double(job.grad[e]) * f;
      square[e % kScaleLanes] += f * f;
    }
    *job.eta = pulse_rate(*job.lr * job.scale, tree_sum<kScaleLanes>(cross), tree_sum<kScaleLanes>(square));
  }
}

void draw_cells(const CellsJob& job, float* out, int threads) {
  const int64_t size = int64_t(job.m) * job.n;
  const uint64_t key = uint64_t(job.state[kKey]);
#pragma omp parallel for num_threads(threads) if (threads > 1 && size > 4096)
  for (int64_t i = 0; i < size; ++i) {
    with_device(int(job.device.kind), [&](auto device) {
      const Cell c = draw_cell<decltype(device)>(job.device, key, uint32_t(job.array), uint32_t(i));
      const float number[kCellNumbers] = {c.b_max, c.b_min, c.s_up, c.s_dn, c.e0, c.e1, c.e2};
      for (int f = 0; f < kCellNumbers; ++f) out[f * size + i] = number[f];
    });
  }
}

void clip(const CellsJob& job, bool write, int64_t* total, int threads) {
  const int64_t size = int64_t(job.m) * job.n;
  const uint32_t step = uint32_t(job.state[kStep]);
  const Held held = job.held();
  int64_t count = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && size > 4096) reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) {
    with_device(int(job.device.kind), [&](auto device) {
      count += at_bound<decltype(device)>(job.device, job.id(i), held, write);
      if (write) set_cell<decltype(device)>(job.device, job.id(i), held, job.w[i], kBySet, step);
    });
  }
  *total += count;
}

void reset(const CellsJob& job, const ResetRange& range, int threads) {
  const int64_t size = int64_t(job.m) * job.n;
  const uint32_t step = uint32_t(job.state[kStep]);
#pragma omp parallel for num_threads(threads) if (threads > 1 && size > 4096)
  for (int64_t i = 0; i < size; ++i) {
    if (i % job.n < range.first || i % job.n >= range.last) continue;
    with_device(int(job.device.kind), [&](auto device) {
      reset_cell<decltype(device)>(job.device, job.id(i), job.held(), range.share, range.number, step);
    });
  }
}

void relax(const std::vector<CellsJob>& jobs, int threads) {
  for (const CellsJob& job : jobs) {
    const int64_t size = int64_t(job.m) * job.n;
    const uint32_t step = uint32_t(job.state[kStep]);
#pragma omp parallel for num_threads(threads) if (threads > 1 && size > 4096)
    for (int64_t i = 0; i < size; ++i) {
      with_device(int(job.device.kind),
                  [&](auto device) { relax_cell<decltype(device)>(job.device, job.id(i), job.held(), step); });
    }
  }
}

}  // namespace cpu
}  // namespace lrtt
