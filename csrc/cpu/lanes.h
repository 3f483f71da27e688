// The vectorised inner loops. lanes.cpp is compiled once for each instruction set and the widest one that
// the processor has is chosen at load; the numbers do not depend on the choice.
#pragma once

#include "../hopfield.h"
#include "../io.h"
#include "../jobs.h"

namespace lrtt {

constexpr int kLanes = 16;
constexpr int kChunk = 4 * kLanes;  // elements whose bits are generated together

// The words of kLanes neighbouring Philox calls, word by word.
using Lanes = uint32_t[4][kLanes];

LRTT_HD void random_lanes(uint64_t key, uint32_t group0, uint32_t c1, uint32_t c2, uint32_t c3, Lanes& out) {
  for (int l = 0; l < kLanes; ++l) {
    const Words r = philox(key, group0 + uint32_t(l), c1, c2, c3);
    out[0][l] = r.w[0];
    out[1][l] = r.w[1];
    out[2][l] = r.w[2];
    out[3][l] = r.w[3];
  }
}

// The slots of one block of samples.
struct BlockPlan {
  int samples;
  int64_t first_sample;    // global index, the random counter
  int width;               // slots of every sample
  int words;               // of the stream
  int row[kBlockSamples];  // operand row of each sample
  float eta_sign;          // of the learning rate
  Train train[kBlockSamples];
};

// bits[word][element], neg[word][element]: where a slot fires, and where the firing operand is negative. Of a counted
// train: bits[sample][element], counted_value with the sign of the operand.
struct Stream {
  uint32_t *bits, *neg;
  int64_t ld;
};

struct LaneKernels {
  const char* name;
  // Largest |v| of a strided vector, as magnitude_bits.
  uint32_t (*largest)(const float* v, int64_t n, int64_t stride);
  // Fills the stream of elements [e0, e0 + kChunk) (those below `elements`).
  void (*generate)(const Operand& v, int64_t elements, int64_t e0, bool is_x, const PulseParams& pulse,
                   const BlockPlan& plan, uint64_t key, uint32_t step, uint32_t array, const Stream& out);
  // Applies a block's pulses to kLanes cells along the job's longer side, starting at `lane0`, at index
  // `other` of the shorter side. Returns the number of pulses; adds what the bounds cut to *lost.
  int64_t (*pulses)(const PulseJob& job, const BlockPlan& plan, int64_t lane0, int64_t other, const Stream& x,
                    const Stream& d, int64_t* lost);
};

const LaneKernels& lane_kernels();

// The converters of io.h on one sample; likewise compiled once for each instruction set, in io_lanes.cpp.
struct IoKernels {
  const char* name;
  // Fills u[n] and the sample's alpha and sigma.
  void (*input)(const IoNumbers& io, const float* x, int64_t n, const ReadId& id, float* u, float* alpha, float* sigma);
  // Fills y[n]; returns whether an output was clipped.
  bool (*output)(const IoNumbers& io, const float* acc, int64_t n, const ReadId& id, float alpha, float sigma,
                 float* y);
};

// Products of hopfield.h; likewise, in hopfield_lanes.cpp.
constexpr int kHopfieldUnits = 32, kHopfieldSamples = 8;

struct HopfieldKernels {
  const char* name;
  // u[samples][kHopfieldUnits] = sums of up to kHopfieldSamples samples, whose states are `stride` apart, with packed
  // weights[inputs][kHopfieldUnits].
  void (*multiply)(const float* states, int64_t stride, int samples, const float* weights, int inputs, float* u);
  // v[i] = apply_rho(rho, v[i]), i < n.
  void (*activate)(int rho, float* v, int n);
};

}  // namespace lrtt
