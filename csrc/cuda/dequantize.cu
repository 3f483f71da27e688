// Decoding of quantised blocks on the device, bound by memory: a thread block brings its raw blocks into shared memory
// by whole 16-byte words, then each thread makes runs of eight neighbouring elements and writes them as one or two
// 16-byte words, so a warp reads and writes whole lines.
#include <cuda_bf16.h>

#include "common.cuh"
#include "weights.h"

namespace lrtt::cuda {
namespace {

using namespace blocks;

constexpr int kThreads = 256, kRun = 8, kElements = 8192;  // of a thread block; a thread makes four runs

enum Place : int { kFlat, kNarrow, kWide };  // out is one piece; rows are found by 32-bit or by 64-bit division

__device__ __forceinline__ void store(float* to, const float (&y)[kRun], bool aligned, bool) {
  if (aligned) {
    reinterpret_cast<float4*>(to)[0] = make_float4(y[0], y[1], y[2], y[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(y[4], y[5], y[6], y[7]);
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = y[j];
  }
}

// The instruction that rounds a pair gives the bits of bfloat(), but for NaN: that only comes from a scale that is not
// finite.
__device__ __forceinline__ uint32_t pair(float low, float high, bool finite) {
  if (!finite) return uint32_t(bfloat(low)) | uint32_t(bfloat(high)) << 16;
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}

__device__ __forceinline__ void store(uint16_t* to, const float (&y)[kRun], bool aligned, bool finite) {
  uint32_t word[kRun / 2];
#pragma unroll
  for (int j = 0; j < kRun / 2; ++j) word[j] = pair(y[2 * j], y[2 * j + 1], finite);
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = uint16_t(word[j / 2] >> (16 * (j % 2)));
  }
}

// Every byte is read once, so it need not stay in a cache.
__device__ __forceinline__ void stage(uint8_t* to, const uint8_t* from, int bytes) {
  const int words = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? bytes / 16 : 0;
  for (int i = int(threadIdx.x); i < words; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  for (int i = words * 16 + int(threadIdx.x); i < bytes; i += kThreads) to[i] = from[i];
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads) decode(const Job job, int64_t total, Place place, bool aligned) {
  constexpr int kBlocks = kElements / T::kSize, kRuns = T::kSize / kRun;
  static_assert(kBlocks * T::kBytes % 16 == 0, "the raw blocks of every thread block begin at a 16-byte word");
  __shared__ __align__(16) uint8_t raw[kBlocks * T::kBytes];
  const int64_t start = int64_t(blockIdx.x) * kBlocks;
  const int count = int(total - start < kBlocks ? total - start : kBlocks);
  stage(raw, job.blocks + start * T::kBytes, count * T::kBytes);
  __syncthreads();
  for (int run = int(threadIdx.x); run < count * kRuns; run += kThreads) {
    const int local = run / kRuns, at = run % kRuns * kRun, group = at / T::kGroup, first = at % T::kGroup;
    const uint8_t* b = raw + local * T::kBytes;
    const Affine a = T::affine(b, group);
    float y[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) y[j] = element<T::kSign>(a, T::quant(b, group, first + j));
    const int64_t block = start + local;
    Out* out = static_cast<Out*>(job.out) + at;
    if (place == kFlat) {
      out += block * T::kSize;
    } else {
      const int64_t row = place == kNarrow ? uint32_t(block) / uint32_t(job.row_blocks) : block / job.row_blocks;
      out += (job.rows ? job.rows[row] : row) * job.out_stride + (block - row * job.row_blocks) * T::kSize;
    }
    store(out, y, aligned, isfinite(a.scale) && isfinite(a.offset));
  }
}

template <class T, class Out>
void launch(const Job& job, cudaStream_t stream) {
  const int64_t total = job.row_count * job.row_blocks;
  const bool flat = !job.rows && (job.row_count == 1 || job.out_stride == job.row_blocks * T::kSize);
  const Place place = flat ? kFlat : total <= int64_t(UINT32_MAX) ? kNarrow : kWide;
  const bool aligned =
      reinterpret_cast<uintptr_t>(job.out) % 16 == 0 && (flat || job.out_stride * int64_t(sizeof(Out)) % 16 == 0);
  decode<T, Out><<<unsigned(blocks_of(total, kElements / T::kSize)), kThreads, 0, stream>>>(job, total, place, aligned);
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
