// Transfer of A*B into C, reinit of A and B, and the counters, on the CPU.
#include "kernels.h"
#include "pulses.h"

namespace lrtt::cpu {
namespace {

// Programs elements [first, last) of an array to the values that stand in its w.
void set_cells(const CellsJob& job, int64_t first, int64_t last, WriteEvent event, uint32_t c2, int threads) {
  const Held held = job.held();
#pragma omp parallel for num_threads(threads) if (threads > 1 && last - first > 4096)
  for (int64_t i = first; i < last; ++i) {
    with_device(int(job.device.kind),
                [&](auto device) { set_cell<decltype(device)>(job.device, job.id(i), held, held.w[i], event, c2); });
  }
}

template <class T>
void transfer_digital(const TransferJob& job, int threads) {
  const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
  T* c = static_cast<T*>(job.c);
  const T tau = T(job.tile.tau);
  const int64_t size = int64_t(job.d) * job.k;
  if (hold(job.visible) == kNoisy)  // it adds to what the cells hold, not to what a read shows
    for (int64_t i = 0; i < size; ++i) c[i] = T(job.cells_c[i]);
#pragma omp parallel for num_threads(threads) if (threads > 1 && int64_t(job.d) * job.k * job.r > 65536)
  for (int64_t i = 0; i < job.d; ++i) {
    for (int64_t j = 0; j < job.k; ++j) {
      T sum = T(0);
      for (int64_t q = 0; q < job.r; ++q) sum += a[i * job.r + q] * b[q * job.k + j];
      c[i * job.k + j] += tau * sum;
    }
  }
  if (int(job.visible.kind) != kIdealFloat)
    set_cells(CellsJob{job.state, job.visible, kC, job.d, job.k, static_cast<float*>(job.c), job.cells_c}, 0, size,
              kByTransfer, uint32_t(job.state[kStep]), threads);
}

double lane_sum(const float* v, int64_t n, int64_t stride, float scale, bool limited) {
  double lane[kSumLanes] = {};
  for (int64_t e = 0; e < n; ++e) {
    const float p = abs_(v[e * stride]) * scale;
    lane[e % kSumLanes] += double(limited ? min_(p, 1.0f) : p);
  }
  return tree_sum<kSumLanes>(lane);
}

// What the trains of term q cannot express, as a share of the term; 0 where nothing saturates.
double cut_share(const TransferJob& job, int q, const Train& t) {
  const float *a = static_cast<const float*>(job.a) + q, *b = static_cast<const float*>(job.b) + int64_t(q) * job.k;
  const double x = lane_sum(b, job.k, 1, t.sx, true) / lane_sum(b, job.k, 1, t.sx, false);
  const double d = lane_sum(a, job.d, job.r, t.sd, true) / lane_sum(a, job.d, job.r, t.sd, false);
  return 1.0 - x * d;
}

void transfer_pulsed(const TransferJob& job, bool residual, void* workspace, int threads) {
  const LaneKernels& lanes = lane_kernels();
  const TileParams& tile = job.tile;
  float *a = static_cast<float*>(job.a), *b = static_cast<float*>(job.b);
  const float tau = float(tile.tau);
  PulseJob target{};
  target.w = static_cast<float*>(job.c);
  target.cells = job.cells_c;
  target.m = job.d;
  target.n = job.k;
  target.x = Operand{b, job.k, 1, kFloat32, 0};
  target.d = Operand{a, 1, job.r, kFloat32, 0};
  target.state = job.state;
  target.counts = job.counts;
  target.array = kC;
  target.pulse = transfer_pulse(tile);
  target.device = job.visible;

  const int full = block_samples(target.pulse);
  BlockPlan plan;
  plan.samples = 0;
  plan.first_sample = 0;
  plan.eta_sign = tau < 0.0f ? 1.0f : -1.0f;  // C += tau A B is an update with learning rate -tau
  for (int q = 0; q < job.r; ++q) {
    // Term q: x = B[q, :], d = A[:, q].
    const uint32_t x_max = lanes.largest(b + int64_t(q) * job.k, job.k, 1), d_max = lanes.largest(a + q, job.d, job.r);
    const int words =
        transfer_words(tau, x_max, d_max, job.visible.granularity, target.pulse.desired_bl, int(tile.max_words));
    bool finite;
    const Train train = plan_train(tau / float(words), x_max, d_max, job.visible.granularity, target.pulse, finite);
    if (!finite) count_nonfinite(job.counts, job.state[kStep], 1);
    if (train.bl > 0) {
      const double intended = double(abs_(tau)) * lane_sum(a + q, job.d, job.r, 1.0f, false) *
                              lane_sum(b + int64_t(q) * job.k, job.k, 1, 1.0f, false);
      job.counts[k_intended] += int64_t(intended * kFixedPoint + 0.5);
      if (!residual) job.counts[k_lost] += int64_t(intended * cut_share(job, q, train) * kFixedPoint + 0.5);
    }
    for (int word = 0; word < words; ++word) {
      plan.row[plan.samples] = q;
      plan.train[plan.samples++] = train;
      if (plan.samples == full) {
        apply_block(target, plan, workspace, threads);
        plan.first_sample += plan.samples;
        plan.samples = 0;
      }
    }
  }
  if (plan.samples > 0) apply_block(target, plan, workspace, threads);
}

// The limit above which |A[:, q]| saturates its trains: what exceeds it stays in A (pulsed_residual).
float residual_limit(const TransferJob& job, int q) {
  const LaneKernels& lanes = lane_kernels();
  const float *a = static_cast<const float*>(job.a) + q, *b = static_cast<const float*>(job.b) + int64_t(q) * job.k;
  PulseParams pulse = transfer_pulse(job.tile);
  pulse.update_management = 1;
  return saturation(float(job.tile.tau), lanes.largest(b, job.k, 1), lanes.largest(a, job.d, job.r),
                    job.visible.granularity, pulse, int(job.tile.max_words));
}

template <class T>
void orthogonalise(T* b, int r, int k, double std) {
  for (int q = 0; q < r; ++q) {
    T* row = b + int64_t(q) * k;
    for (int p = 0; p <= q; ++p) {  // p == q: normalise
      const T* other = b + int64_t(p) * k;
      double lane[kSumLanes] = {};
      for (int j = 0; j < k; ++j) lane[j % kSumLanes] += double(row[j]) * double(other[j]);
      const double dot = tree_sum<kSumLanes>(lane);
      const double unit = std * std * double(k);  // squared norm of a finished row
      if (p < q) {
        const double share = dot / unit;
        for (int j = 0; j < k; ++j) row[j] = T(double(row[j]) - share * double(other[j]));
      } else {
        const double scale = sqrt_(unit / dot);
        for (int j = 0; j < k; ++j) row[j] = T(double(row[j]) * scale);
      }
    }
  }
}

template <class T>
void reinit_tile(const TransferJob& job, bool keep_residual, int threads) {
  T *a = static_cast<T*>(job.a), *b = static_cast<T*>(job.b);
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t cycle = uint32_t(job.state[kCycle]);
  const int kind = int(job.tile.reinit);
  const bool held = int(job.fast.kind) != kIdealFloat;
  const CellsJob b_cells{job.state, job.fast, kB, job.r, job.k, reinterpret_cast<float*>(b), job.cells_b};
  for (int q = 0; q < job.r; ++q) {
    const float limit = keep_residual ? residual_limit(job, q) : 0.0f;
    bool kept = false;
    for (int64_t i = 0; i < job.d; ++i) {
      T& v = a[i * job.r + q];
      v = keep_residual ? T(excess(float(v), limit)) : T(0);
      kept |= v != T(0);
    }
    if (kept) continue;
#pragma omp parallel for num_threads(threads) if (threads > 1 && job.k > 16384)
    for (int64_t j = 0; j < job.k; ++j) {
      const uint32_t e = uint32_t(q * int64_t(job.k) + j);
      const Words words = philox(key, e / 4, 0, cycle, counter3(kReinit, kB, 0));
      b[e] = T(draw_b(kind, float(job.tile.reinit_std), words.w[e & 3]));
    }
    if (held && kind != kOrthogonal)
      set_cells(b_cells, q * int64_t(job.k), (q + 1) * int64_t(job.k), kByReinit, cycle, threads);
  }
  if (kind == kOrthogonal) {
    orthogonalise(b, job.r, job.k, job.tile.reinit_std);
    if (held) set_cells(b_cells, 0, int64_t(job.r) * job.k, kByReinit, cycle, threads);
  }
  // A is written too: a stuck cell does not go to 0.
  if (held)
    set_cells(CellsJob{job.state, job.fast, kA, job.d, job.r, reinterpret_cast<float*>(a), job.cells_a}, 0,
              int64_t(job.d) * job.r, kByReinit, cycle, threads);
}

void reinit_one(const TransferJob& job, bool keep_residual, int threads) {
  job.is_double ? reinit_tile<double>(job, keep_residual, threads) : reinit_tile<float>(job, keep_residual, threads);
}

}  // namespace

void reinit(const std::vector<TransferJob>& jobs, int threads) {
  for (const TransferJob& job : jobs) reinit_one(job, false, threads);
}

void transfer(const std::vector<TransferJob>& jobs, bool force, void* workspace, int threads) {
  for (const TransferJob& job : jobs) {
    const int64_t counter = job.state[kCounter] + job.increment;
    if (force || counter >= int64_t(job.tile.transfer_every)) {
      const int mode = int(job.tile.transfer_mode);
      const bool residual = mode == kPulsedResidual && !force;  // a flush leaves nothing behind
      if (mode == kDigital) {
        job.is_double ? transfer_digital<double>(job, threads) : transfer_digital<float>(job, threads);
      } else {
        transfer_pulsed(job, residual, workspace, threads);
      }
      job.state[kCycle] += 1;
      job.state[kCounter] = 0;
      job.counts[k_transfers] += 1;
      reinit_one(job, residual, threads);
    } else {
      job.state[kCounter] = counter;
    }
    job.state[kStep] += 1;
  }
}

}  // namespace lrtt::cpu
