// Pairs of half-precision numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lrtt::cuda {

// To the nearest, halves to even; `low` in the lower half of the word.
template <bool bfloat>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if constexpr (bfloat) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

}  // namespace lrtt::cuda
