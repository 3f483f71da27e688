// Transfer of A*B into C, reinit of A and B, and the counters. Every kernel returns at once on a tile that is not due:
// the decision is read from the tile's counter on the device.
#include <algorithm>

#include "pulses.cuh"
#include "rectangles.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 4;

struct Term {
  Train train;
  int words, first_word;
  float limit;  // |A[:, q]| beyond it stays (pulsed_residual)
  int kept;     // row q of B is not redrawn
};

struct DeviceTransfer {
  TransferJob job;
  Term* terms;    // pulsed modes, [r]
  int64_t pulse;  // index in the table of DevicePulse, -1 for a digital transfer
  int64_t first_cell_block, first_reinit_block;
};

__device__ __forceinline__ bool keeps_residual(const TransferJob& job, int force) {
  return int(job.tile.transfer_mode) == kPulsedResidual && !force;
}

// ------------------------------------------------------------------ pulsed: terms and trains

__device__ __forceinline__ double lane_sum(const float* v, int64_t n, int64_t stride, float scale, bool limited) {
  double sum = 0.0;
  for (int64_t e = threadIdx.x % 32; e < n; e += 32) {
    const float p = abs_(v[e * stride]) * scale;
    sum += double(limited ? min_(p, 1.0f) : p);
  }
  return warp_tree(sum);
}

__device__ __forceinline__ uint32_t lane_max(const float* v, int64_t n, int64_t stride) {
  uint32_t top = 0;
  for (int64_t e = threadIdx.x % 32; e < n; e += 32) top = max(top, magnitude_bits(v[e * stride]));
  return warp_max(top);
}

// One warp a term.
__device__ void plan_term(const TransferJob& job, int q, bool residual, Term& term) {
  const float* a = static_cast<const float*>(job.a) + q;
  const float* b = static_cast<const float*>(job.b) + int64_t(q) * job.k;
  const float tau = float(job.tile.tau), granularity = job.visible.granularity;
  const PulseParams pulse = transfer_pulse(job.tile);
  const int cap = int(job.tile.max_words);
  const uint32_t x_max = lane_max(b, job.k, 1), d_max = lane_max(a, job.d, job.r);
  const int words = transfer_words(tau, x_max, d_max, granularity, pulse.desired_bl, cap);
  bool finite;
  const Train train = plan_train(tau / float(words), x_max, d_max, granularity, pulse, finite);
  const bool first = threadIdx.x % 32 == 0;
  if (!finite && first) count_nonfinite(job.counts, job.state[kStep], 1);
  if (train.bl > 0) {
    const double intended =
        double(abs_(tau)) * lane_sum(a, job.d, job.r, 1.0f, false) * lane_sum(b, job.k, 1, 1.0f, false);
    const double x = lane_sum(b, job.k, 1, train.sx, true) / lane_sum(b, job.k, 1, train.sx, false);
    const double d = lane_sum(a, job.d, job.r, train.sd, true) / lane_sum(a, job.d, job.r, train.sd, false);
    if (first) {
      add(job.counts + k_intended, int64_t(intended * kFixedPoint + 0.5));
      if (!residual) add(job.counts + k_lost, int64_t(intended * (1.0 - x * d) * kFixedPoint + 0.5));
    }
  }
  if (first) {
    PulseParams managed = pulse;
    managed.update_management = 1;
    term.train = train;
    term.words = words;
    term.limit = residual ? saturation(tau, x_max, d_max, granularity, managed, cap) : 0.0f;
    term.kept = residual && from_bits(d_max) > term.limit;
  }
}

__global__ void __launch_bounds__(kBlockSamples)
    plan_transfer(const DeviceTransfer* table, int count, DevicePulse* pulses, float* levels, int force) {
  if (int(blockIdx.x) >= count) {  // kLevelBlocks blocks
    bool due = false;
    for (int i = int(threadIdx.x); i < count; i += kBlockSamples)
      due |= table[i].pulse >= 0 && fires(table[i].job, force);
    if (__syncthreads_or(due)) fill_levels(levels, int(blockIdx.x) - count);
    return;
  }
  const DeviceTransfer& t = table[blockIdx.x];
  if (t.pulse < 0 || !fires(t.job, force)) return;
  DevicePulse& p = pulses[t.pulse];
  const bool residual = keeps_residual(t.job, force);
  for (int q = int(threadIdx.x / 32); q < t.job.r; q += kBlockSamples / 32) plan_term(t.job, q, residual, t.terms[q]);
  for (int s = int(threadIdx.x); s < p.blocks * p.samples; s += kBlockSamples) {
    p.trains[s] = Planned{0, 0.0f, 0.0f};
    p.rows[s] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int first = 0;
    for (int q = 0; q < t.job.r; ++q) {
      t.terms[q].first_word = first;
      first += t.terms[q].words;
    }
  }
  __syncthreads();
  for (int q = int(threadIdx.x); q < t.job.r; q += kBlockSamples) {
    const Term& term = t.terms[q];
    for (int word = term.first_word; word < term.first_word + term.words; ++word) {
      p.trains[word] = Planned{term.train.bl, term.train.sx, term.train.sd};
      p.rows[word] = q;
    }
  }
  __syncthreads();
  for (int block = 0; block < p.blocks; ++block)
    lay_out(p, block, int(threadIdx.x) < p.samples ? p.trains[block * p.samples + int(threadIdx.x)].bl : 0);
  __syncthreads();
  if (threadIdx.x < 32) place_blocks(p);
}

// ------------------------------------------------------------------ digital

// Resident blocks run through the cells of all tiles: a launch that finds no tile due must cost next to nothing.
__global__ void __launch_bounds__(kRectangleThreads, kRectangleBlocks)
    transfer_digital(const DeviceTransfer* table, int count, int64_t blocks, int force) {
  __shared__ alignas(16) unsigned char memory[sizeof(Terms<double>)];
  bool due = false;
  for (int i = threadIdx.x; i < count; i += kRectangleThreads) due |= table[i].pulse < 0 && fires(table[i].job, force);
  if (!__syncthreads_or(due)) return;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const DeviceTransfer& t = find_job(table, count, block, &DeviceTransfer::first_cell_block);
    if (t.pulse >= 0 || !fires(t.job, force)) continue;
    const int64_t rectangle = block - t.first_cell_block;
    if (t.job.is_double) {
      add_products(t.job, rectangle, reinterpret_cast<Terms<double>&>(memory));
    } else {
      add_products(t.job, rectangle, reinterpret_cast<Terms<float>&>(memory));
    }
  }
}

// ------------------------------------------------------------------ reinit and counters

__device__ __forceinline__ float fresh_b(const TransferJob& job, uint32_t cycle, uint32_t e) {
  const Words words = philox(uint64_t(job.state[kKey]), e / 4, 0, cycle, counter3(kReinit, kB, 0));
  return draw_b(int(job.tile.reinit), float(job.tile.reinit_std), words.w[e & 3]);
}

template <class T>
__device__ void renew(const DeviceTransfer& t, int64_t e, uint32_t cycle, bool residual) {
  const TransferJob& job = t.job;
  const bool held = int(job.fast.kind) != kIdealFloat;
  const int64_t a_size = int64_t(job.d) * job.r, b_size = int64_t(job.r) * job.k;
  if (e < a_size) {
    T& a = static_cast<T*>(job.a)[e];
    a = residual ? T(excess(float(a), t.terms[e % job.r].limit)) : T(0);
    if (held)
      set(job.fast, job.state, kA, e, Held{static_cast<float*>(job.a), job.cells_a, a_size}, float(a), kByReinit,
          cycle);
  }
  if (e < b_size && int(job.tile.reinit) != kOrthogonal && !(residual && t.terms[e / job.k].kept)) {
    T& b = static_cast<T*>(job.b)[e];
    b = T(fresh_b(job, cycle, uint32_t(e)));
    if (held)
      set(job.fast, job.state, kB, e, Held{static_cast<float*>(job.b), job.cells_b, b_size}, float(b), kByReinit,
          cycle);
  }
}

// Orthogonal rows by modified Gram-Schmidt, one warp a tile: sums in the lane order of tree_sum<32>.
template <class T>
__device__ void renew_orthogonal(const TransferJob& job, uint32_t cycle) {
  T* b = static_cast<T*>(job.b);
  const int lane = int(threadIdx.x);
  const double std = job.tile.reinit_std, unit = std * std * double(job.k);
  for (int64_t e = lane; e < int64_t(job.r) * job.k; e += 32) b[e] = T(fresh_b(job, cycle, uint32_t(e)));
  __syncwarp();
  for (int q = 0; q < job.r; ++q) {
    T* row = b + int64_t(q) * job.k;
    for (int p = 0; p <= q; ++p) {
      const T* other = b + int64_t(p) * job.k;
      double sum = 0.0;
      for (int j = lane; j < job.k; j += 32) sum += double(row[j]) * double(other[j]);
      const double dot = warp_tree(sum);
      if (p < q) {
        const double share = dot / unit;
        for (int j = lane; j < job.k; j += 32) row[j] = T(double(row[j]) - share * double(other[j]));
      } else {
        const double scale = sqrt_(unit / dot);
        for (int j = lane; j < job.k; j += 32) row[j] = T(double(row[j]) * scale);
      }
      __syncwarp();
    }
  }
  if (int(job.fast.kind) == kIdealFloat) return;
  const Held held{static_cast<float*>(job.b), job.cells_b, int64_t(job.r) * job.k};
  for (int64_t e = lane; e < held.size; e += 32) set(job.fast, job.state, kB, e, held, float(b[e]), kByReinit, cycle);
}

// `initial`: the draw of the present cycle, whatever the counter says.
__global__ void __launch_bounds__(kThreads)
    reinit_tiles(const DeviceTransfer* table, int count, int force, int initial) {
  const DeviceTransfer& t = find_job(table, count, int64_t(blockIdx.x), &DeviceTransfer::first_reinit_block);
  if (!initial && !fires(t.job, force)) return;
  const uint32_t cycle = uint32_t(t.job.state[kCycle]) + (initial ? 0u : 1u);
  const bool residual = !initial && keeps_residual(t.job, force);
  const int64_t first = (int64_t(blockIdx.x) - t.first_reinit_block) * kThreads * kItems + threadIdx.x;
  for (int i = 0; i < kItems; ++i) {
    const int64_t e = first + int64_t(i) * kThreads;
    t.job.is_double ? renew<double>(t, e, cycle, residual) : renew<float>(t, e, cycle, residual);
  }
}

__global__ void __launch_bounds__(32) reinit_orthogonal(const DeviceTransfer* table, int force, int initial) {
  const TransferJob& job = table[blockIdx.x].job;
  if (int(job.tile.reinit) != kOrthogonal || (!initial && !fires(job, force))) return;
  const uint32_t cycle = uint32_t(job.state[kCycle]) + (initial ? 0u : 1u);
  job.is_double ? renew_orthogonal<double>(job, cycle) : renew_orthogonal<float>(job, cycle);
}

__global__ void __launch_bounds__(kThreads) advance(const DeviceTransfer* table, int count, int force) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= count) return;
  const TransferJob& job = table[i].job;
  if (fires(job, force)) {
    job.state[kCycle] += 1;
    job.state[kCounter] = 0;
    job.counts[k_transfers] += 1;
  } else {
    job.state[kCounter] += job.increment;
  }
  job.state[kStep] += 1;
}

// ------------------------------------------------------------------ host side

struct Layout {
  DeviceTransfer* table;
  DevicePulse* pulse_table;
  TransferJob* pulse_jobs;
  float* levels;
  std::vector<DeviceTransfer> tiles;
  std::vector<DevicePulse> pulses;
  std::vector<TransferJob> pulsed;
  std::vector<PulseSet> sets;
  int64_t cells = 0, reinits = 0;
  bool digital = false, orthogonal = false;
  size_t bytes;

  Layout(const std::vector<TransferJob>& list, void* workspace) {
    Arena arena(workspace);
    table = arena.take<DeviceTransfer>(list.size());
    pulse_table = arena.take<DevicePulse>(list.size());
    pulse_jobs = arena.take<TransferJob>(list.size());
    levels = arena.take<float>(kNoiseLevels);
    std::vector<size_t> order;  // tiles of pulsed transfers
    for (const TransferJob& job : list) {
      DeviceTransfer t{};
      t.job = job;
      t.pulse = -1;
      t.first_cell_block = cells;
      t.first_reinit_block = reinits;
      orthogonal |= int(job.tile.reinit) == kOrthogonal;
      const int64_t a = int64_t(job.d) * job.r, b = int64_t(job.r) * job.k;
      reinits += blocks_of(a > b ? a : b, kThreads * kItems);
      if (int(job.tile.transfer_mode) == kDigital) {
        digital = true;
        cells += rectangles(job);
      } else {
        t.terms = arena.take<Term>(size_t(job.r));
        order.push_back(tiles.size());
      }
      tiles.push_back(t);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return kernel_order(pulse_of(list[a]).job, pulse_of(list[b]).job); });
    for (size_t i : order) {
      tiles[i].pulse = int64_t(pulses.size());
      pulses.push_back(pulse_of(list[i]));
      pulsed.push_back(list[i]);
    }
    sets = arrange(pulses, arena);
    bytes = arena.used();
  }

  static DevicePulse pulse_of(const TransferJob& job) {
    PulseJob target{};
    target.w = static_cast<float*>(job.c);
    target.cells = job.cells_c;
    target.m = job.d;
    target.n = job.k;
    target.x = Operand{job.b, job.k, 1, kFloat32, 0};
    target.d = Operand{job.a, 1, job.r, kFloat32, 0};
    target.samples = int64_t(job.r) * int64_t(job.tile.max_words);
    target.state = job.state;
    target.counts = job.counts;
    target.array = kC;
    target.device = job.visible;
    DevicePulse p = describe(target, transfer_pulse(job.tile));
    p.transfer = 1;
    p.eta_sign = float(job.tile.tau) < 0.0f ? 1.0f : -1.0f;  // C += tau A B is an update with learning rate -tau
    return p;
  }
};

void launch_reinit(const Layout& layout, int force, int initial, cudaStream_t stream) {
  const int count = int(layout.tiles.size());
  reinit_tiles<<<unsigned(layout.reinits), kThreads, 0, stream>>>(layout.table, count, force, initial);
  if (layout.orthogonal) reinit_orthogonal<<<unsigned(count), 32, 0, stream>>>(layout.table, force, initial);
}

}  // namespace

size_t workspace_bytes(const std::vector<TransferJob>& jobs) { return Layout(jobs, nullptr).bytes; }

void transfer(const std::vector<TransferJob>& list, bool forced, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  const Layout layout(list, workspace);
  const int count = int(layout.tiles.size()), force = forced ? 1 : 0;
  store_tables(layout.tiles, layout.table, layout.pulses, layout.pulse_table, layout.pulsed, layout.pulse_jobs, stream);
  if (!layout.pulses.empty()) {
    plan_transfer<<<unsigned(count + kLevelBlocks), kBlockSamples, 0, stream>>>(layout.table, count, layout.pulse_table,
                                                                                layout.levels, force);
    check(cudaGetLastError(), "transfer planning");
    apply_trains(layout.pulses, layout.pulse_table, layout.sets, layout.levels, Predicate{layout.pulse_jobs, force},
                 stream);
  }
  if (layout.digital) {
    const int64_t most = int64_t(kRectangleBlocks) * processors();
    transfer_digital<<<unsigned(layout.cells < most ? layout.cells : most), kRectangleThreads, 0, stream>>>(
        layout.table, count, layout.cells, force);
  }
  launch_reinit(layout, force, 0, stream);
  advance<<<unsigned(blocks_of(count, kThreads)), kThreads, 0, stream>>>(layout.table, count, force);
  check(cudaGetLastError(), "transfer");
}

void reinit(const std::vector<TransferJob>& list, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  const Layout layout(list, workspace);
  store_table(layout.tiles, layout.table, stream);
  launch_reinit(layout, 0, 1, stream);
  check(cudaGetLastError(), "reinit");
}

}  // namespace lrtt::cuda
