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
constexpr int kTileLanes = 64, kColumnsEach = 4, kTileColumns = kTileLanes * kColumnsEach;
constexpr int kRowGroups = kRectangleThreads / kTileLanes;
constexpr int kTerms = 16;  // of A that lie in shared memory together

template <class T>
constexpr int rows_each = 32 / int(sizeof(T));

inline int64_t rectangles(const TransferJob& job) {
  return blocks_of(job.d, kRowGroups * (job.is_double ? rows_each<double> : rows_each<float>)) *
         blocks_of(job.k, kTileColumns);
}

// The sums over q run in order, a product rounded before it is added, as on the CPU.
template <class T>
__device__ __forceinline__ void add_products(const TransferJob& job, int64_t rectangle, void* memory) {
  constexpr int rows = rows_each<T>, tile_rows = kRowGroups * rows;
  T(*left)[tile_rows] = static_cast<T(*)[tile_rows]>(memory);  // [kTerms][tile_rows] of A
  const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
  T* c = static_cast<T*>(job.c);
  const int64_t across = (job.k + kTileColumns - 1) / kTileColumns;
  const int64_t row0 = rectangle / across * tile_rows, own0 = row0 + int(threadIdx.x) / kTileLanes * rows;
  const int column0 = int(rectangle % across) * kTileColumns + int(threadIdx.x) % kTileLanes;
  const auto each = [&](auto&& use) {
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h)
        if (own0 + i < job.d && column0 + h * kTileLanes < job.k)
          use(i, h, (own0 + i) * job.k + column0 + h * kTileLanes);
  };
  // On noisy cells it adds to what they hold, not to what a read shows.
  const bool noisy = hold(job.visible) == kNoisy;
  T before[rows][kColumnsEach], sum[rows][kColumnsEach] = {};
  each([&](int i, int h, int64_t cell) { before[i][h] = noisy ? T(job.cells_c[cell]) : c[cell]; });
  for (int q0 = 0; q0 < job.r; q0 += kTerms) {
    const int many = min(job.r - q0, kTerms);
    __syncthreads();  // the terms before are done with
    for (int i = int(threadIdx.x); i < tile_rows * kTerms; i += kRectangleThreads) {
      const int row = i / kTerms, q = i % kTerms;
      if (row0 + row < job.d && q < many) left[q][row] = a[(row0 + row) * job.r + q0 + q];
    }
    __syncthreads();
#pragma unroll 4
    for (int q = 0; q < many; ++q) {
      T right[kColumnsEach];
#pragma unroll
      for (int h = 0; h < kColumnsEach; ++h) {
        const int column = column0 + h * kTileLanes;
        right[h] = column < job.k ? b[int64_t(q0 + q) * job.k + column] : T(0);
      }
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int h = 0; h < kColumnsEach; ++h) sum[i][h] += left[q][int(own0 - row0) + i] * right[h];
    }
  }
  const T tau = T(job.tile.tau);
  each([&](int i, int h, int64_t cell) { c[cell] = before[i][h] + tau * sum[i][h]; });
  if (int(job.visible.kind) == kIdealFloat) return;
  // Written through the device: what drawing a cell takes is not to be in the loops above.
  const Held held{static_cast<float*>(job.c), job.cells_c, int64_t(job.d) * job.k};
#pragma unroll 1
  for (int i = 0; i < rows * kColumnsEach; ++i) {
    const int64_t row = own0 + i / kColumnsEach, column = column0 + i % kColumnsEach * kTileLanes;
    if (row >= job.d || column >= job.k) continue;
    const int64_t cell = row * job.k + column;
    set(job.visible, job.state, kC, cell, held, held.w[cell], kByTransfer, uint32_t(job.state[kStep]));
  }
}

}  // namespace lrtt::cuda
