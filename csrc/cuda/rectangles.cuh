// Digital transfer C += tau A B, a rectangle of C at a time; and cells that are written through their device.
#pragma once

#include "common.cuh"

namespace lrtt::cuda {

__device__ __forceinline__ void set(const DeviceParams& device, const int64_t* state, uint32_t array, int64_t cell,
                                    Held held, float target, WriteEvent event, uint32_t c2) {
  const CellId id{uint64_t(state[kKey]), array, uint32_t(cell)};
  with_device(int(device.kind), [&](auto model) { set_cell<decltype(model)>(device, id, held, target, event, c2); });
}

// A thread block takes a rectangle of C, strip by strip from above: a thread kColumnsEach columns, kTileLanes apart,
// and rows_each rows of a strip. The strips share what lies of B in shared memory, and a strip's values are under way
// while the one before is computed.
constexpr int kRectangleThreads = 256;
constexpr int kRectangleBlocks = 3;  // resident on a multiprocessor
constexpr int kTileLanes = 64, kColumnsEach = 4, kTileColumns = kTileLanes * kColumnsEach;
constexpr int kRowGroups = kRectangleThreads / kTileLanes;
constexpr int kStrips = 4;
constexpr int kTerms = 16;  // of A and B that lie in shared memory together

template <class T>
constexpr int rows_each = 16 / int(sizeof(T));

template <class T>
constexpr int strip_rows = kRowGroups * rows_each<T>;

template <class T>
struct alignas(16) Terms {
  T left[kTerms][strip_rows<T>], right[kTerms][kTileColumns];
};

inline int64_t rectangles(const TransferJob& job) {
  return blocks_of(job.d, kStrips * (job.is_double ? strip_rows<double> : strip_rows<float>)) *
         blocks_of(job.k, kTileColumns);
}

// The sums over q run in order, a product rounded before it is added, as on the CPU.
template <class T>
__device__ __forceinline__ void add_products(const TransferJob& job, int64_t rectangle, Terms<T>& terms) {
  constexpr int rows = rows_each<T>;
  const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
  T* c = static_cast<T*>(job.c);
  // On noisy cells it adds to what they hold, not to what a read shows.
  const T* from = hold(job.visible) == kNoisy ? reinterpret_cast<const T*>(job.cells_c) : c;
  const T tau = T(job.tile.tau);
  const int d = job.d, k = job.k, r = job.r;
  const int across = (k + kTileColumns - 1) / kTileColumns, top = int(rectangle / across) * kStrips * strip_rows<T>;
  const int lane = int(threadIdx.x) % kTileLanes, group = int(threadIdx.x) / kTileLanes * rows;
  const int left_column = int(rectangle % across) * kTileColumns, column0 = left_column + lane;
  const auto inside = [&](int own0, int i, int h) { return own0 + i < d && column0 + h * kTileLanes < k; };
  const auto cell = [&](int own0, int i, int h) { return int64_t(own0 + i) * k + column0 + h * kTileLanes; };
  T next[rows][kColumnsEach];
  const auto load = [&](int own0) {
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h) next[i][h] = inside(own0, i, h) ? from[cell(own0, i, h)] : T(0);
  };
  load(top + group);
#pragma unroll 1
  for (int strip = 0; strip < kStrips; ++strip) {
    const int row0 = top + strip * strip_rows<T>, own0 = row0 + group;
    if (row0 >= d) break;
    T before[rows][kColumnsEach], sum[rows][kColumnsEach] = {};
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h) before[i][h] = next[i][h];
    if (strip + 1 < kStrips) load(own0 + strip_rows<T>);
#pragma unroll 1
    for (int q0 = 0; q0 < r; q0 += kTerms) {
      const int many = min(r - q0, kTerms);
      __syncthreads();  // the terms before are done with
      for (int i = int(threadIdx.x); i < strip_rows<T> * kTerms; i += kRectangleThreads) {
        const int row = i / kTerms, q = i % kTerms;
        if (row0 + row < d && q < many) terms.left[q][row] = a[int64_t(row0 + row) * r + q0 + q];
      }
      static_assert(kTileColumns == kRectangleThreads, "a thread for each column");
      const int column = left_column + int(threadIdx.x);
      if (strip == 0 || r > kTerms) {
#pragma unroll
        for (int q = 0; q < kTerms; ++q)
          if (q < many && column < k) terms.right[q][threadIdx.x] = b[int64_t(q0 + q) * k + column];
      }
      __syncthreads();
#pragma unroll 4
      for (int q = 0; q < many; ++q) {
        T right[kColumnsEach], own[rows];
#pragma unroll
        for (int h = 0; h < kColumnsEach; ++h) right[h] = terms.right[q][lane + h * kTileLanes];
        static_assert(rows * sizeof(T) == sizeof(uint4), "one load");
        *reinterpret_cast<uint4*>(own) = *reinterpret_cast<const uint4*>(&terms.left[q][group]);
#pragma unroll
        for (int i = 0; i < rows; ++i)
#pragma unroll
          for (int h = 0; h < kColumnsEach; ++h) sum[i][h] += own[i] * right[h];
      }
    }
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h)
        if (inside(own0, i, h)) c[cell(own0, i, h)] = before[i][h] + tau * sum[i][h];
  }
  if (int(job.visible.kind) == kIdealFloat) return;
  // Written through the device: what drawing a cell takes is not to be in the loops above.
  const Held held{static_cast<float*>(job.c), job.cells_c, int64_t(d) * k};
#pragma unroll 1
  for (int n = 0; n < kStrips * rows * kColumnsEach; ++n) {
    const int own0 = top + n / (rows * kColumnsEach) * strip_rows<T> + group;
    const int i = n / kColumnsEach % rows, h = n % kColumnsEach;
    if (!inside(own0, i, h)) continue;
    const int64_t at = cell(own0, i, h);
    set(job.visible, job.state, kC, at, held, held.w[at], kByTransfer, uint32_t(job.state[kStep]));
  }
}

}  // namespace lrtt::cuda
