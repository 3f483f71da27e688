// See decode.h. Compiled with LRTT_ISA set to the name of an instruction set. Nothing here may call a
// non-inlined function of another header: the linker could hand its wide-vector copy to a narrow machine.
#include "decode.h"

namespace lrtt {
namespace {

using namespace blocks;

LRTT_HD void put(float* out, float y) { *out = y; }
LRTT_HD void put(uint16_t* out, float y) { *out = bfloat(y); }

template <class T, int group, class Out>
LRTT_HD void decode_group(const uint8_t* __restrict b, Out* __restrict out) {
  const Affine a = T::affine(b, group);
// Sixteen rounds would be unrolled to scalars before the loop could become a vector.
#pragma GCC unroll 1
  for (int j = 0; j < T::kGroup; ++j) put(out + group * T::kGroup + j, element<T::kSign>(a, T::quant(b, group, j)));
}

// Groups are unrolled, so that shifts and offsets are constants of each loop.
template <class T, class Out, int group = 0>
LRTT_HD void decode_block(const uint8_t* __restrict b, Out* __restrict out) {
  decode_group<T, group>(b, out);
  if constexpr (group + 1 < T::kSize / T::kGroup) decode_block<T, Out, group + 1>(b, out);
}

// Rows [i0, i1) of columns, in pieces that lie in one row.
template <class F>
LRTT_HD void pieces(const Job& job, int64_t first, int64_t last, F&& f) {
  while (first < last) {
    const int64_t row = first / job.row_blocks, column = first - row * job.row_blocks;
    const int64_t count = job.row_blocks - column < last - first ? job.row_blocks - column : last - first;
    f(first, job.rows ? job.rows[row] : row, column, count);
    first += count;
  }
}

template <class T, class Out>
void decode_blocks(const Job& job, int64_t first, int64_t last) {
  pieces(job, first, last, [&](int64_t at, int64_t row, int64_t column, int64_t count) __attribute__((always_inline)) {
    const uint8_t* from = job.blocks + at * T::kBytes;
    Out* to = static_cast<Out*>(job.out) + row * job.out_stride + column * T::kSize;
    for (int64_t i = 0; i < count; ++i) decode_block<T>(from + i * T::kBytes, to + i * T::kSize);
  });
}

template <class Out>
void decode_plain(const Job& job, int64_t first, int64_t last) {
  pieces(job, first, last, [&](int64_t at, int64_t row, int64_t column, int64_t count) __attribute__((always_inline)) {
    const uint8_t* __restrict from = job.blocks + at * (job.type == kF32 ? 4 : 2);
    Out* __restrict to = static_cast<Out*>(job.out) + row * job.out_stride + column;
    if (job.type == kF32) {
      for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, from + 4 * i, 4);
        put(to + i, float_of(bits));
      }
    } else {
      const bool is_half = job.type == kF16;
      for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        put(to + i, is_half ? half(bits) : float_of(uint32_t(bits) << 16));
      }
    }
  });
}

template <class Out>
bool decode_to(const Job& job, int64_t first, int64_t last) {
  if (job.type == kF32 || job.type == kF16 || job.type == kBF16) {
    decode_plain<Out>(job, first, last);
    return true;
  }
  return with_type(job.type, [&](auto type) __attribute__((always_inline)) {
    decode_blocks<decltype(type), Out>(job, first, last);
  });
}

bool decode(const Job& job, int64_t first, int64_t last) {
  return job.is_bfloat ? decode_to<uint16_t>(job, first, last) : decode_to<float>(job, first, last);
}

}  // namespace

#define LRTT_CAT_(a, b) a##b
#define LRTT_CAT(a, b) LRTT_CAT_(a, b)

extern const DecodeKernel LRTT_CAT(decode_kernel_, LRTT_ISA);
const DecodeKernel LRTT_CAT(decode_kernel_, LRTT_ISA) = {decode};

}  // namespace lrtt
