// The products of hopfield.h. Compiled with LRTT_ISA set to the name of an instruction set, like lanes.cpp and under
// its rule: nothing here may call a non-inlined function of another header.
#if defined(__x86_64__) || defined(__amd64__)
#  include <immintrin.h>
#endif

#include "lanes.h"

namespace lrtt {
namespace {

// Vectors by hand: compilers do not keep the sums in registers. fma is the only operation, so all sets agree.
#if defined(__AVX512F__)
using Vector = __m512;
LRTT_HD Vector zero() { return _mm512_setzero_ps(); }
LRTT_HD Vector load(const float* p) { return _mm512_loadu_ps(p); }
LRTT_HD Vector spread(float x) { return _mm512_set1_ps(x); }
LRTT_HD Vector fma_(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
LRTT_HD void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
constexpr int kRows = 8;  // kRows x kColumns sums in registers
#elif defined(__FMA__)
using Vector = __m256;
LRTT_HD Vector zero() { return _mm256_setzero_ps(); }
LRTT_HD Vector load(const float* p) { return _mm256_loadu_ps(p); }
LRTT_HD Vector spread(float x) { return _mm256_set1_ps(x); }
LRTT_HD Vector fma_(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
LRTT_HD void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
constexpr int kRows = 4;
#else
using Vector = float;
LRTT_HD Vector zero() { return 0.0f; }
LRTT_HD Vector load(const float* p) { return *p; }
LRTT_HD Vector spread(float x) { return x; }
LRTT_HD void store(float* p, Vector v) { *p = v; }
constexpr int kRows = 4;
#endif
constexpr int kWidth = sizeof(Vector) / sizeof(float), kColumns = 2;

template <int rows>
LRTT_HD void block(const float* states, int64_t stride, const float* weights, int inputs, float* sums) {
  Vector acc[rows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) acc[r][c] = zero();
  for (int k = 0; k < inputs; ++k) {
    Vector w[kColumns];
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) w[c] = load(weights + int64_t(k) * kHopfieldUnits + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vector x = spread(states[r * stride + k]);
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) acc[r][c] = fma_(x, w[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) store(sums + r * kHopfieldUnits + c * kWidth, acc[r][c]);
}

// One slice of `samples` samples.
template <int samples>
LRTT_HD void slice(const float* states, int64_t stride, const float* weights, int inputs, float* sums) {
  constexpr int rows = samples < kRows ? samples : kRows;
  for (int u = 0; u < kHopfieldUnits; u += kColumns * kWidth)
    for (int s = 0; s < samples; s += rows)
      block<rows>(states + s * stride, stride, weights + u, inputs, sums + s * kHopfieldUnits + u);
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

template <int samples>
void multiply_some(const float*& states, int64_t stride, int& left, const float* weights, int inputs, float*& u) {
  for (; left >= samples; left -= samples) {
    products<samples>(states, stride, weights, inputs, u);
    states += samples * stride;
    u += samples * kHopfieldUnits;
  }
}

void multiply(const float* states, int64_t stride, int samples, const float* weights, int inputs, float* u) {
  multiply_some<8>(states, stride, samples, weights, inputs, u);
  multiply_some<4>(states, stride, samples, weights, inputs, u);
  multiply_some<2>(states, stride, samples, weights, inputs, u);
  multiply_some<1>(states, stride, samples, weights, inputs, u);
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
