// What a layer on a tile multiplies by: C + alpha A B, added up in float32 in one pass over C, in half precision under
// autocast; and the factors in the same type.
#include <type_traits>

#include "common.cuh"
#include "halves.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;  // of a thread block, at most
constexpr int kAhead = 4;  // rows whose loads are under way while as many are computed

// `columns` neighbouring floats, in one access.
template <int columns>
__device__ __forceinline__ void load_columns(const float* at, float (&value)[columns]) {
  if constexpr (columns == 4) {
    const float4 four = *reinterpret_cast<const float4*>(at);
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
  } else {
    const float2 two = *reinterpret_cast<const float2*>(at);
    value[0] = two.x, value[1] = two.y;
  }
}

template <int type, int columns>
__device__ __forceinline__ void store_columns(void* row, int column, const float (&value)[columns]) {
  if constexpr (type == kFloat32) {
    float* at = static_cast<float*>(row) + column;
    if constexpr (columns == 4) {
      *reinterpret_cast<float4*>(at) = make_float4(value[0], value[1], value[2], value[3]);
    } else {
      *reinterpret_cast<float2*>(at) = make_float2(value[0], value[1]);
    }
  } else {
    constexpr bool bfloat = type == kBFloat16;
    uint32_t* at = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(row) + column);
    const uint32_t low = narrow_pair<bfloat>(value[0], value[1]);
    if constexpr (columns == 4) {
      *reinterpret_cast<uint2*>(at) = make_uint2(low, narrow_pair<bfloat>(value[2], value[3]));
    } else {
      *at = low;
    }
  }
}

template <int type>
__device__ __forceinline__ void store_one(void* to, int64_t at, float value) {
  if constexpr (type == kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = uint16_t(narrow_pair<type == kBFloat16>(value, 0.0f));
  }
}

constexpr int kFactorItems = 8;  // of a thread

// A^T and B in `type`.
template <int type>
__device__ __forceinline__ void copy_factors(const MergeJob& job, int64_t block) {
  const int64_t of_a = job.d * job.r, all = of_a + int64_t(job.r) * job.k;
#pragma unroll
  for (int i = 0; i < kFactorItems; ++i) {
    const int64_t e = (block * kFactorItems + i) * kThreads + threadIdx.x;
    if (e < of_a) {
      store_one<type>(job.a_t, e, job.a[e % job.d * job.r + e / job.d]);
    } else if (e < all) {
      store_one<type>(job.b_out, e - of_a, job.b[e - of_a]);
    }
  }
}

// A thread keeps its columns of B, `rank` rows of them, and runs down `each` rows of C. The first `before` rows of
// thread blocks copy the factors.
template <int type, int rank, int columns>
__global__ void __launch_bounds__(kThreads, 2) merge_rows(const MergeJob job, int each, int before) {
  __shared__ alignas(16) float a[kRows][rank];
  if (int(blockIdx.y) < before) return copy_factors<type>(job, int64_t(blockIdx.y) * gridDim.x + blockIdx.x);
  const int64_t first = int64_t(int(blockIdx.y) - before) * each, left = job.d - first;
  const int rows = int(left < each ? left : each), column = int(blockIdx.x * kThreads + threadIdx.x) * columns;
  const bool inside = column < job.k;
  const float* from = job.c + first * job.k + column;
  char* to = static_cast<char*>(job.out) + first * job.k * (type == kFloat32 ? 4 : 2);
  float next[kAhead][columns];
  const auto load = [&](int row0) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (inside && row0 + u < rows) load_columns<columns>(from + int64_t(row0 + u) * job.k, next[u]);
  };
  load(0);
  float b[rank][columns] = {};
#pragma unroll
  for (int q = 0; q < rank; ++q)
    if (inside && q < job.r) load_columns<columns>(job.b + int64_t(q) * job.k + column, b[q]);
  for (int i = threadIdx.x; i < each * rank; i += kThreads) {
    const int row = i / rank, q = i % rank;
    a[row][q] = row < rows && q < job.r ? job.alpha * job.a[(first + row) * job.r + q] : 0.0f;
  }
  __syncthreads();
  if (!inside) return;
#pragma unroll 1
  for (int row0 = 0; row0 < rows; row0 += kAhead) {
    float sum[kAhead][columns];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int c = 0; c < columns; ++c) sum[u][c] = next[u][c];
    load(row0 + kAhead);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row0 + u >= rows) break;
#pragma unroll
      for (int q = 0; q < rank; ++q)
#pragma unroll
        for (int c = 0; c < columns; ++c) sum[u][c] = fma_(a[row0 + u][q], b[q][c], sum[u][c]);
      store_columns<type, columns>(to + int64_t(row0 + u) * job.k * (type == kFloat32 ? 4 : 2), column, sum[u]);
    }
  }
}

template <int type>
void launch(const MergeJob& job, cudaStream_t stream) {
  const auto with = [&](auto kernel, int columns) {
    const int64_t across = blocks_of(job.k, kThreads * columns);
    int each = kRows;  // fewer where blocks would be fewer than processors
    while (each > kAhead && across * blocks_of(job.d, each) < processors()) each /= 2;
    const int64_t before = blocks_of((job.d + job.k) * job.r, kThreads * kFactorItems * across);
    const dim3 grid(unsigned(across), unsigned(before + blocks_of(job.d, each)));
    kernel<<<grid, kThreads, 0, stream>>>(job, each, int(before));
  };
  if (job.r <= 8) {
    with(merge_rows<type, 8, 4>, 4);
  } else if (job.r <= 16) {
    with(merge_rows<type, 16, 4>, 4);
  } else {
    with(merge_rows<type, 32, 2>, 2);
  }
  check(cudaGetLastError(), "merge");
}

}  // namespace

void merge(const MergeJob& job, Stream handle) {
  const cudaStream_t stream = native(handle);
  switch (job.type) {
    case kFloat32: launch<kFloat32>(job, stream); break;
    case kBFloat16: launch<kBFloat16>(job, stream); break;
    default: launch<kFloat16>(job, stream);
  }
}

}  // namespace lrtt::cuda
