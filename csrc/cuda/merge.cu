// The weight that a layer reads under autocast: C + alpha A B in half precision, added up in float32 in one pass over
// C.
#include "common.cuh"
#include "halves.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256, kRows = 32;
constexpr int kAhead = 8;  // rows whose loads are under way together

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

// A thread keeps its columns of B, `rank` rows of them, and runs down kRows rows of C.
template <bool bfloat, int rank, int columns>
__global__ void __launch_bounds__(kThreads, 2) merge_rows(const MergeJob job) {
  __shared__ alignas(16) float a[kRows][rank];
  const int64_t first = int64_t(blockIdx.y) * kRows, left = job.d - first;
  const int rows = int(left < kRows ? left : kRows), column = int(blockIdx.x * kThreads + threadIdx.x) * columns;
  for (int i = threadIdx.x; i < kRows * rank; i += kThreads) {
    const int row = i / rank, q = i % rank;
    a[row][q] = row < rows && q < job.r ? job.alpha * job.a[(first + row) * job.r + q] : 0.0f;
  }
  __syncthreads();
  if (column >= job.k) return;
  float b[rank][columns] = {};
#pragma unroll
  for (int q = 0; q < rank; ++q)
    if (q < job.r) load_columns<columns>(job.b + int64_t(q) * job.k + column, b[q]);
  const float* from = job.c + first * job.k + column;
  uint16_t* to = static_cast<uint16_t*>(job.out) + first * job.k + column;
  for (int row0 = 0; row0 < rows; row0 += kAhead) {
    float sum[kAhead][columns];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (row0 + u < rows) load_columns<columns>(from + int64_t(row0 + u) * job.k, sum[u]);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row0 + u >= rows) continue;
#pragma unroll
      for (int q = 0; q < rank; ++q)
#pragma unroll
        for (int c = 0; c < columns; ++c) sum[u][c] = fma_(a[row0 + u][q], b[q][c], sum[u][c]);
      uint32_t* at = reinterpret_cast<uint32_t*>(to + int64_t(row0 + u) * job.k);
      const uint32_t low = narrow_pair<bfloat>(sum[u][0], sum[u][1]);
      if constexpr (columns == 4) {
        *reinterpret_cast<uint2*>(at) = make_uint2(low, narrow_pair<bfloat>(sum[u][2], sum[u][3]));
      } else {
        *at = low;
      }
    }
  }
}

template <int rank, int columns>
void launch(const MergeJob& job, cudaStream_t stream) {
  const dim3 grid(unsigned(blocks_of(job.k, kThreads * columns)), unsigned(blocks_of(job.d, kRows)));
  const auto kernel = job.bfloat ? merge_rows<true, rank, columns> : merge_rows<false, rank, columns>;
  kernel<<<grid, kThreads, 0, stream>>>(job);
  check(cudaGetLastError(), "merge");
}

}  // namespace

void merge(const MergeJob& job, Stream handle) {
  const cudaStream_t stream = native(handle);
  if (job.r <= 8) {
    launch<8, 4>(job, stream);
  } else if (job.r <= 16) {
    launch<16, 4>(job, stream);
  } else {
    launch<32, 2>(job, stream);
  }
}

}  // namespace lrtt::cuda
