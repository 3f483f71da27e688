// Norms and sums of one block of segments. Compiled with LRTT_ISA set to the name of an instruction set, like lanes.cpp
// and under its rule: nothing here may call a non-inlined function of another header.
#include "segment_lanes.h"

#include <cstring>
#if defined(__FMA__)
#  include <immintrin.h>
#endif

namespace lrtt {
namespace {

// Registers of the instruction set; sums of squares in one of 256 bits at most, as floats are converted slower to
// wider.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSumBytes = 32;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSumBytes = 32;
#else
constexpr int kBytes = 16, kSumBytes = 16;
#endif
constexpr int kWide = kSumBytes / 8;
typedef double Sums __attribute__((vector_size(kSumBytes)));
template <class T>
struct Register {
  typedef T Full __attribute__((vector_size(kBytes)));
  typedef T OfSums __attribute__((vector_size(kWide * sizeof(T))));
};

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* from) {
  V value;
  memcpy(&value, from, sizeof(V));
  return value;
}

// sum + v * v. The square of a float is exact in a double: fused or not, the bits are the same.
inline __attribute__((always_inline)) Sums add_square(Sums sum, Sums v, float) {
#if defined(__FMA__)
  return _mm256_fmadd_pd(v, v, sum);
#else
  return sum + v * v;
#endif
}
inline __attribute__((always_inline)) Sums add_square(Sums sum, Sums v, double) { return sum + v * v; }

// Lanes whose sums stay in registers while their rows pass.
constexpr int kSums = 8, kGroup = kSums * kWide;
static_assert(kSegmentLanes % kGroup == 0 && kSegmentBlock % kSegmentLanes == 0);

template <class T>
inline __attribute__((always_inline)) void add_squares(const T* from, Sums (&sum)[kSums], Sums& bad) {
#pragma GCC unroll 8
  for (int k = 0; k < kSums; ++k) {
    const Sums v = __builtin_convertvector(load<typename Register<T>::OfSums>(from + kWide * k), Sums);
    sum[k] = add_square(sum[k], v, T());
    if (sizeof(T) == sizeof(double)) bad += v - v;
  }
}

template <class T>
inline __attribute__((always_inline)) double norm(const T* slot, int64_t n, bool* bad) {
  alignas(64) double lanes[kSegmentLanes];
  Sums any = {};
  for (int g = 0; g < kSegmentLanes; g += kGroup) {
    Sums sum[kSums] = {};
    int64_t e = g;
    for (; e + kGroup <= n; e += kSegmentLanes) add_squares(slot + e, sum, any);
    if (e < n) {
      alignas(64) T rest[kGroup] = {};
      memcpy(rest, slot + e, size_t(n - e) * sizeof(T));
      add_squares(rest, sum, any);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) memcpy(lanes + g + kWide * k, &sum[k], sizeof(Sums));
  }
  if (bad != nullptr) {
    double total = 0.0;
    for (int k = 0; k < kWide; ++k) total += any[k];
    *bad = !(total == 0.0);
  }
  for (int half = kSegmentLanes / 2; half >= kWide; half /= 2)  // tree_sum
    for (int l = 0; l < half; l += kWide) {
      const Sums both = load<Sums>(lanes + l) + load<Sums>(lanes + l + half);
      memcpy(lanes + l, &both, sizeof(both));
    }
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// `lines` vectors of each slot pass through the tree together.
template <class T, class Line, int lines>
inline __attribute__((always_inline)) void strip(const SegmentPart<T>& part, int64_t e) {
  constexpr int width = int(sizeof(Line) / sizeof(T));
  Line waiting[kSegmentDepth][lines];
  const T scale = T(part.scale);
  T* const* out = part.out;
  int depth = 0;
  for (int m = 0; m < part.moves; ++m) {
    const SegmentMove move = part.move[m];
    const T* const* own = part.slots + move.first;
    const auto slot = [&](int s, int k) __attribute__((always_inline)) { return load<Line>(own[s] + e + k * width); };
    Line value[lines];
    if (move.slots == 4) {
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) value[k] = (slot(0, k) + slot(1, k)) + (slot(2, k) + slot(3, k));
    } else if (move.slots == 2) {
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) value[k] = slot(0, k) + slot(1, k);
    } else {
      const double weight = part.weights[move.first];
      const bool absent = own[0] == nullptr || weight == 0.0;  // not a product with 0: the slot may hold NaN
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) {
        value[k] = absent ? Line{} : slot(0, k);
        if (!absent && weight != 1.0) value[k] = value[k] * T(weight);
      }
    }
    for (int a = 0; a < move.adds; ++a) {
      --depth;
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) value[k] = waiting[depth][k] + value[k];
    }
    if (move.emit) {
      T* to = *out++ + e;
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) {
        const Line scaled = value[k] * scale;
        memcpy(to + k * width, &scaled, sizeof(Line));
      }
    } else {
#pragma GCC unroll 8
      for (int k = 0; k < lines; ++k) waiting[depth][k] = value[k];
      ++depth;
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void sum(const SegmentPart<T>& part) {
  typedef typename Register<T>::Full Full;
  constexpr int one = kBytes / int(sizeof(T)), lines = 4;
  int64_t e = 0;
  for (; e + lines * one <= part.size; e += lines * one) strip<T, Full, lines>(part, e);
  for (; e + one <= part.size; e += one) strip<T, Full, 1>(part, e);
  for (; e < part.size; ++e) strip<T, T, 1>(part, e);
}

double norm_float(const float* slot, int64_t n) { return norm(slot, n, nullptr); }
double norm_double(const double* slot, int64_t n, bool* bad) { return norm(slot, n, bad); }
void sum_float(const SegmentPart<float>& part) { sum(part); }
void sum_double(const SegmentPart<double>& part) { sum(part); }

}  // namespace

#define LRTT_CAT_(a, b) a##b
#define LRTT_CAT(a, b) LRTT_CAT_(a, b)
#define LRTT_STR_(a) #a
#define LRTT_STR(a) LRTT_STR_(a)

extern const SegmentLanes LRTT_CAT(segment_lanes_, LRTT_ISA);
const SegmentLanes LRTT_CAT(segment_lanes_, LRTT_ISA) = {LRTT_STR(LRTT_ISA), norm_float, norm_double, sum_float,
                                                         sum_double};

}  // namespace lrtt
