// Decoding of quantised blocks on the device: a thread makes eight neighbouring elements of one group, so a warp writes
// whole lines; the few bytes of a block that several threads need come from the first-level cache.
#include "common.cuh"
#include "weights.h"

namespace lrtt::cuda {
namespace {

using namespace blocks;

constexpr int kThreads = 256, kRun = 8;

__device__ __forceinline__ void store(float* to, const float (&y)[kRun], bool aligned) {
  if (aligned) {
    reinterpret_cast<float4*>(to)[0] = make_float4(y[0], y[1], y[2], y[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(y[4], y[5], y[6], y[7]);
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = y[j];
  }
}

__device__ __forceinline__ void store(uint16_t* to, const float (&y)[kRun], bool aligned) {
  if (aligned) {
    uint32_t word[kRun / 2];
#pragma unroll
    for (int j = 0; j < kRun / 2; ++j) word[j] = uint32_t(bfloat(y[2 * j])) | uint32_t(bfloat(y[2 * j + 1])) << 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = bfloat(y[j]);
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads) decode(const Job job, bool aligned) {
  constexpr int kRuns = T::kSize / kRun;  // of a block
  const int64_t run = int64_t(blockIdx.x) * kThreads + threadIdx.x, block = run / kRuns;
  if (block >= job.row_count * job.row_blocks) return;
  const int at = int(run - block * kRuns) * kRun, group = at / T::kGroup, first = at % T::kGroup;
  const uint8_t* b = job.blocks + block * T::kBytes;
  const Affine a = T::affine(b, group);
  float y[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) y[j] = element<T::kSign>(a, T::quant(b, group, first + j));
  const int64_t row = block / job.row_blocks, column = block - row * job.row_blocks;
  Out* out = static_cast<Out*>(job.out) + (job.rows ? job.rows[row] : row) * job.out_stride + column * T::kSize + at;
  store(out, y, aligned);
}

template <class T, class Out>
void launch(const Job& job, cudaStream_t stream) {
  const int64_t runs = job.row_count * job.row_blocks * (T::kSize / kRun);
  const bool aligned =
      reinterpret_cast<uintptr_t>(job.out) % 16 == 0 && job.out_stride * int64_t(sizeof(Out)) % 16 == 0;
  decode<T, Out><<<unsigned(blocks_of(runs, kThreads)), kThreads, 0, stream>>>(job, aligned);
}

}  // namespace

void dequantize(const Job& job, void* stream) {
  if (job.row_count * job.row_blocks == 0) return;
  const bool known = with_type(job.type, [&](auto type) {
    using T = decltype(type);
    if (job.is_bfloat) {
      launch<T, uint16_t>(job, native(stream));
    } else {
      launch<T, float>(job, native(stream));
    }
  });
  if (!known)
    throw std::invalid_argument("lrtt::dequantize_: type must be one that the core decodes, got " +
                                std::to_string(job.type));
  check(cudaGetLastError(), "dequantize");
}

}  // namespace lrtt::cuda
