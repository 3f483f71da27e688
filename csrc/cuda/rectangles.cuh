// Digital transfer C += tau A B, a rectangle of C at a time; and cells that are written through their device.
#pragma once

#include "common.cuh"

namespace lrtt::cuda {

__device__ __forceinline__ void set(const DeviceParams& device, const int64_t* state, uint32_t array, int64_t cell,
                                    Held held, float target, WriteEvent event, uint32_t c2) {
  const CellId id{uint64_t(state[kKey]), array, uint32_t(cell)};
  with_device(int(device.kind), [&](auto model) { set_cell<decltype(model)>(device, id, held, target, event, c2); });
}

// A thread block takes a rectangle of C, a thread kColumnsEach columns of it, kTileLanes apart, and rows_each rows:
// that many values of A and B give rows_each * kColumnsEach products.
constexpr int kRectangleThreads = 256;
constexpr int kRectangleBlocks = 3;  // resident on a multiprocessor
constexpr int kTileLanes = 64, kColumnsEach = 4, kTileColumns = kTileLanes * kColumnsEach;
constexpr int kRowGroups = kRectangleThreads / kTileLanes;
constexpr int kTerms = 16;  // of A and B that lie in shared memory together

template <class T>
constexpr int rows_each = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Terms {
  T left[kTerms][kRowGroups * rows_each<T>], right[kTerms][kTileColumns];
};

inline int64_t rectangles(const TransferJob& job) {
  return blocks_of(job.d, kRowGroups * (job.is_double ? rows_each<double> : rows_each<float>)) *
         blocks_of(job.k, kTileColumns);
}

// The sums over q run in order, a product rounded before it is added, as on the CPU.
template <class T>
__device__ __forceinline__ void add_products(const TransferJob& job, int64_t rectangle, Terms<T>& terms) {
  constexpr int rows = rows_each<T>, tile_rows = kRowGroups * rows;
  const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
  T* c = static_cast<T*>(job.c);
  // On noisy cells it adds to what they hold, not to what a read shows.
  const T* from = hold(job.visible) == kNoisy ? reinterpret_cast<const T*>(job.cells_c) : c;
  const T tau = T(job.tile.tau);
  const int d = job.d, k = job.k, r = job.r;
  const int across = (k + kTileColumns - 1) / kTileColumns, row0 = int(rectangle / across) * tile_rows;
  const int group = int(threadIdx.x) / kTileLanes * rows, own0 = row0 + group;
  const int column0 = int(rectangle % across) * kTileColumns + int(threadIdx.x) % kTileLanes;
  const auto inside = [&](int i, int h) { return own0 + i < d && column0 + h * kTileLanes < k; };
  const int64_t cell0 = int64_t(own0) * k + column0;
  T before[rows][kColumnsEach], sum[rows][kColumnsEach] = {};
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int h = 0; h < kColumnsEach; ++h)
      before[i][h] = inside(i, h) ? from[cell0 + int64_t(i) * k + h * kTileLanes] : T(0);
  for (int q0 = 0; q0 < r; q0 += kTerms) {
    const int many = min(r - q0, kTerms);
    __syncthreads();  // the terms before are done with
    for (int i = int(threadIdx.x); i < tile_rows * kTerms; i += kRectangleThreads) {
      const int row = i / kTerms, q = i % kTerms;
      if (row0 + row < d && q < many) terms.left[q][row] = a[int64_t(row0 + row) * r + q0 + q];
    }
    static_assert(kTileColumns == kRectangleThreads, "a thread for each column");
    const int column = int(rectangle % across) * kTileColumns + int(threadIdx.x);
#pragma unroll
    for (int q = 0; q < kTerms; ++q)
      if (q < many && column < k) terms.right[q][threadIdx.x] = b[int64_t(q0 + q) * k + column];
    __syncthreads();
#pragma unroll 4
    for (int q = 0; q < many; ++q) {
      T right[kColumnsEach], own[rows];
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h) right[h] = terms.right[q][int(threadIdx.x) % kTileLanes + h * kTileLanes];
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
      if (inside(i, h)) c[cell0 + int64_t(i) * k + h * kTileLanes] = before[i][h] + tau * sum[i][h];
  if (int(job.visible.kind) == kIdealFloat) return;
  // Written through the device: what drawing a cell takes is not to be in the loops above.
  const Held held{static_cast<float*>(job.c), job.cells_c, int64_t(d) * k};
#pragma unroll 1
  for (int i = 0; i < rows * kColumnsEach; ++i) {
    if (!inside(i / kColumnsEach, i % kColumnsEach)) continue;
    const int64_t cell = cell0 + int64_t(i / kColumnsEach) * k + i % kColumnsEach * kTileLanes;
    set(job.visible, job.state, kC, cell, held, held.w[cell], kByTransfer, uint32_t(job.state[kStep]));
  }
}

}  // namespace lrtt::cuda
