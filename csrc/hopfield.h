// Relaxation of a layered Hopfield network (lightning_lrtt/free_nudged/hopfield.py): what one state becomes in one
// step.
//
// Layers of odd and of even number see only each other, so the states are two groups, and M [odd, even] holds all
// couplings: u_odd = s_even M^T + drive_odd, u_even = s_odd M + drive_even, s <- rho(u).
//
// ORDER OF SUMS: the inputs of a unit are cut into kSlices slices of slice_size() inputs. A slice is added up in order
// with fma, starting from 0; the slices are added as a tree (slices_sum), the drive comes last. So neither the tiling
// of a device nor the number of its processors changes a bit, and a CPU and a GPU agree.
#pragma once

#include "math.h"

namespace lrtt {

enum Rho { kTanh = 0, kSigmoid = 1, kHardSigmoid = 2, kIdentity = 3 };
enum Nudge {
  kFree = 0,          // no nudge
  kSolve = 1,         // (u + beta y) / (1 + beta): squared error where rho is piecewise linear
  kSquaredError = 2,  // u - beta (s - y)
  kCrossEntropy = 3,  // u - beta (softmax(s) sum(y) - y)
  kHold = 4,          // y
};

// A window of `steps` steps from `odd` and `even` to `new_odd` and `new_even`, by way of `spare_odd` and `spare_even`.
// Rows of a group are `odd` (or `even`) elements long and contiguous.
struct HopfieldJob {
  const float *matrix, *odd_drive, *even_drive;  // [odd, even], [samples, odd], [even]
  const float *start_odd, *start_even;
  float *new_odd, *new_even, *spare_odd, *spare_even;
  const float *target, *beta;  // [samples, outputs]; [] or [samples]
  int64_t beta_stride;         // 0 or 1
  int64_t samples;
  int odd, even, steps;
  int in_turn;          // even states move after the odd ones, from the new odd ones
  int outputs;          // the last so many states of one group
  int outputs_are_odd;  // which
  int rho, output_rho, nudge;
};

constexpr int kSlices = 8;
// Inputs in a slice; a multiple of 4. Those beyond the last input count as 0, which leaves sums as they are.
LRTT_HD int slice_size(int inputs) { return (inputs + 4 * kSlices - 1) / (4 * kSlices) * 4; }

// A state that another processor may have written in this call: not from a cache of one's own.
LRTT_HD float fresh(const float* p) {
#ifdef __CUDA_ARCH__
  return __ldcg(p);
#else
  return *p;
#endif
}

LRTT_HD float slices_sum(float a, float b, float c, float d, float e, float f, float g, float h) {
  return ((a + b) + (c + d)) + ((e + f) + (g + h));
}

// To 2 units in the last place: Cephes tanhf (Moshier) near 0, elsewhere by exp_.
LRTT_HD float tanh_(float u) {
  const float a = abs_(u), z = u * u;
  float p = -5.70498872745e-3f;
  p = fma_(p, z, 2.06390887954e-2f);
  p = fma_(p, z, -5.37397155531e-2f);
  p = fma_(p, z, 1.33314422036e-1f);
  p = fma_(p, z, -3.33332819422e-1f);
  const float small = fma_(p * z, u, u);
  const float large = 1.0f - 2.0f / (exp_(min_(2.0f * a, 20.0f)) + 1.0f);
  const float t = a < 0.625f ? small : from_bits(to_bits(large) | (to_bits(u) & 0x80000000u));
  return u == u ? t : u;
}

LRTT_HD float sigmoid_(float u) {
  const float s = 1.0f / (1.0f + exp_(max_(min_(-u, 80.0f), -80.0f)));
  return u == u ? s : u;
}

LRTT_HD float apply_rho(int rho, float u) {
  if (rho == kTanh) return tanh_(u);
  if (rho == kSigmoid) return sigmoid_(u);
  if (rho == kHardSigmoid) return u < 0.0f ? 0.0f : u > 1.0f ? 1.0f : u;  // NaN stays
  return u;
}

// dcost/ds of output k of one sample.
LRTT_HD float cost_slope(const HopfieldJob& job, const float* s, const float* y, int k) {
  const float own = fresh(s + k);
  if (job.nudge == kSquaredError) return own - y[k];
  float largest = fresh(s);
  for (int i = 1; i < job.outputs; ++i) largest = max_(fresh(s + i), largest);
  float sum = 0.0f, share = 0.0f;
  for (int i = 0; i < job.outputs; ++i) {
    sum += exp_(max_(fresh(s + i) - largest, -80.0f));
    share += y[i];
  }
  return exp_(max_(own - largest, -80.0f)) / sum * share - y[k];
}

// The new state of output k of sample n from its u; `old` are the sample's outputs before the step.
LRTT_HD float output_state(const HopfieldJob& job, int64_t n, int k, float u, const float* old) {
  const float* y = job.target + n * job.outputs;
  if (job.nudge == kHold) return y[k];
  if (job.nudge == kSolve) {
    const float beta = job.beta[n * job.beta_stride], scale = 1.0f / (1.0f + beta);
    u = fma_(u, scale, beta * y[k] * scale);
  } else if (job.nudge != kFree) {
    u = fma_(-job.beta[n * job.beta_stride], cost_slope(job, old, y, k), u);
  }
  return apply_rho(job.output_rho, u);
}

}  // namespace lrtt
