// Relaxation of a layered Hopfield network on the CPU (hopfield.h): tiles of units over threads, the loops of
// hopfield_lanes.cpp inside.
#include "../hopfield.h"

#include "kernels.h"
#include "lanes.h"

namespace lrtt {

extern const HopfieldKernels hopfield_kernels_base;
#ifdef LRTT_X86_CLONES
extern const HopfieldKernels hopfield_kernels_v3, hopfield_kernels_v4;
#endif

namespace cpu {
namespace {

constexpr int kUnits = kHopfieldUnits, kSamples = kHopfieldSamples;

// The set that lane_kernels() chose.
const HopfieldKernels& hopfield_kernels() {
#ifdef LRTT_X86_CLONES
  for (const HopfieldKernels* kernels : {&hopfield_kernels_v4, &hopfield_kernels_v3})
    if (strcmp(kernels->name, lane_kernels().name) == 0) return *kernels;
#endif
  return hopfield_kernels_base;
}

int tiles_of(int units) { return (units + kUnits - 1) / kUnits; }

// One group of states.
struct Group {
  bool is_odd;
  int units, inputs, hidden;
  const float* drive;
  int64_t drive_stride;
  float* packed;  // [tile][input][unit], zeros beyond the last unit
};

void pack(const HopfieldJob& job, const Group& g, int tile) {
  float* to = g.packed + int64_t(tile) * g.inputs * kUnits;
  const int first = tile * kUnits, units = g.units - first < kUnits ? g.units - first : kUnits;
  if (units < kUnits) memset(to, 0, sizeof(float) * size_t(g.inputs) * kUnits);
  if (g.is_odd) {
    for (int u = 0; u < units; ++u)
      for (int k = 0; k < g.inputs; ++k) to[k * kUnits + u] = job.matrix[int64_t(first + u) * job.even + k];
  } else {
    for (int k = 0; k < g.inputs; ++k)
      memcpy(to + k * kUnits, job.matrix + int64_t(k) * job.even + first, sizeof(float) * size_t(units));
  }
}

void move(const HopfieldJob& job, const Group& g, int tile, int64_t sample0, const float* source, const float* old,
          float* next) {
  const HopfieldKernels& kernels = hopfield_kernels();
  float sums[kSamples * kUnits];
  const int count = int(job.samples - sample0 < kSamples ? job.samples - sample0 : kSamples);
  const int first = tile * kUnits, units = g.units - first < kUnits ? g.units - first : kUnits;
  kernels.multiply(source + sample0 * g.inputs, g.inputs, count, g.packed + int64_t(tile) * g.inputs * kUnits, g.inputs,
                   sums);
  const int rest = g.hidden - first, hidden = rest < 0 ? 0 : rest < units ? rest : units;
  for (int s = 0; s < count; ++s) {
    const int64_t n = sample0 + s, row = n * g.units;
    const float* drive = g.drive + n * g.drive_stride + first;
    float *u = sums + s * kUnits, *to = next + row + first;
    for (int i = 0; i < units; ++i) u[i] += drive[i];
    kernels.activate(job.rho, u, hidden);
    memcpy(to, u, sizeof(float) * size_t(hidden));
    for (int i = hidden; i < units; ++i) to[i] = output_state(job, n, first + i - g.hidden, u[i], old + row + g.hidden);
  }
}

void move(const HopfieldJob& job, const Group& g, const float* source, const float* old, float* next, int threads) {
  const int tiles = tiles_of(g.units);
  const int64_t blocks = (job.samples + kSamples - 1) / kSamples;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < tiles * blocks; ++i) move(job, g, int(i / blocks), i % blocks * kSamples, source, old, next);
}

}  // namespace

size_t hopfield_bytes(const HopfieldJob& job) {
  return sizeof(float) * kUnits * (size_t(tiles_of(job.odd)) * job.even + size_t(tiles_of(job.even)) * job.odd);
}

void hopfield_window(const HopfieldJob& job, void* workspace, int threads) {
  float* packed = static_cast<float*>(workspace);
  const Group odd{true,          job.odd, job.even, job.odd - (job.outputs_are_odd ? job.outputs : 0),
                  job.odd_drive, job.odd, packed};
  const Group even{false,
                   job.even,
                   job.odd,
                   job.even - (job.outputs_are_odd ? 0 : job.outputs),
                   job.even_drive,
                   0,
                   packed + int64_t(tiles_of(job.odd)) * job.even * kUnits};
  for (const Group* g : {&odd, &even})
    for (int tile = 0; tile < tiles_of(g->units); ++tile) pack(job, *g, tile);
  const float *old_odd = job.start_odd, *old_even = job.start_even;
  for (int step = 0; step < job.steps; ++step) {
    const bool last = (job.steps - 1 - step) % 2 == 0;
    float *next_odd = last ? job.new_odd : job.spare_odd, *next_even = last ? job.new_even : job.spare_even;
    move(job, odd, old_even, old_odd, next_odd, threads);
    move(job, even, job.in_turn ? next_odd : old_odd, old_even, next_even, threads);
    old_odd = next_odd;
    old_even = next_even;
  }
}

}  // namespace cpu
}  // namespace lrtt
