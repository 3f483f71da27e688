// The products of hopfield.h. Compiled with LRTT_ISA set to the name of an instruction set, like lanes.cpp and under
// its rule: nothing here may call a non-inlined function of another header.
#include "lanes.h"

namespace lrtt {
namespace {

// One slice of `samples` samples: in registers from its first input to its last.
template <int samples>
LRTT_HD void slice(const float* states, int64_t stride, const float* weights, int inputs, float* sums) {
  float acc[samples][kHopfieldUnits] = {};
  for (int k = 0; k < inputs; ++k) {
    const float* w = weights + int64_t(k) * kHopfieldUnits;
#pragma GCC unroll 8
    for (int s = 0; s < samples; ++s) {
      const float x = states[s * stride + k];
#pragma GCC unroll 32
      for (int u = 0; u < kHopfieldUnits; ++u) acc[s][u] = fma_(x, w[u], acc[s][u]);
    }
  }
  memcpy(sums, acc, sizeof(acc));
}

template <int samples>
void products(const float* states, int64_t stride, const float* weights, int inputs, float* u) {
  float sums[kSlices][samples * kHopfieldUnits];
  const int size = slice_size(inputs);
  for (int i = 0; i < kSlices; ++i) {
    const int first = i * size < inputs ? i * size : inputs, rest = inputs - first;
    slice<samples>(states + first, stride, weights + int64_t(first) * kHopfieldUnits, rest < size ? rest : size,
                   sums[i]);
  }
  for (int e = 0; e < samples * kHopfieldUnits; ++e)
    u[e] = slices_sum(sums[0][e], sums[1][e], sums[2][e], sums[3][e], sums[4][e], sums[5][e], sums[6][e], sums[7][e]);
}

void multiply(const float* states, int64_t stride, int samples, const float* weights, int inputs, float* u) {
  if (samples == kHopfieldSamples) {
    products<kHopfieldSamples>(states, stride, weights, inputs, u);
  } else {
    for (int s = 0; s < samples; ++s) products<1>(states + s * stride, stride, weights, inputs, u + s * kHopfieldUnits);
  }
}

template <class Function>
LRTT_HD void over(float* v, int n, Function function) {
  for (int i = 0; i < n; ++i) v[i] = function(v[i]);
}

void activate(int rho, float* v, int n) {
  if (rho == kTanh) over(v, n, [](float u) { return apply_rho(kTanh, u); });
  if (rho == kSigmoid) over(v, n, [](float u) { return apply_rho(kSigmoid, u); });
  if (rho == kHardSigmoid) over(v, n, [](float u) { return apply_rho(kHardSigmoid, u); });
}

}  // namespace

#define LRTT_CAT_(a, b) a##b
#define LRTT_CAT(a, b) LRTT_CAT_(a, b)
#define LRTT_STR_(a) #a
#define LRTT_STR(a) LRTT_STR_(a)

extern const HopfieldKernels LRTT_CAT(hopfield_kernels_, LRTT_ISA);
const HopfieldKernels LRTT_CAT(hopfield_kernels_, LRTT_ISA) = {LRTT_STR(LRTT_ISA), multiply, activate};

}  // namespace lrtt
