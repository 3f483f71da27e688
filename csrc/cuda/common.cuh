// Job tables in scratch memory, error checks and small device helpers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lrtt::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("lightning_lrtt: ") + what + " failed: " + cudaGetErrorString(status) +
                             "; lrtt.build_info() says for which CUDA version and architectures this build is");
}

inline cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Hands out aligned pieces of the scratch memory; with base 0 it only adds up sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(size_t count) {
    used_ = (used_ + 255) & ~size_t(255);
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += count * sizeof(T);
    return piece;
  }
  size_t used() const { return used_ + 256; }
  // Scratch that `other`, a copy of this arena, has handed out is in use.
  void reach(const Arena& other) { used_ = used_ > other.used_ ? used_ : other.used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

// A table of jobs travels as a kernel argument, which a graph captures by value, and is stored in scratch memory for
// the kernels that follow. So one launch of each serves any number of tiles.
template <class Job, int capacity>
struct alignas(16) Page {
  Job job[capacity];
};

// Lanes that read different arguments wait for each other: few and long accesses, by several blocks. The last access of
// a table may reach into the rest of its piece of the Arena.
template <class Job, int capacity>
__device__ __forceinline__ void copy_page(const Page<Job, capacity>& page, int count, Job* table) {
  static_assert(sizeof(page) == capacity * sizeof(Job), "pages lie end to end");
  const uint4* from = reinterpret_cast<const uint4*>(page.job);
  uint4* to = reinterpret_cast<uint4*>(table);
  const int words = int((count * sizeof(Job) + sizeof(uint4) - 1) / sizeof(uint4));
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < words; i += int(gridDim.x * blockDim.x)) to[i] = from[i];
}

template <class Job, int capacity>
__global__ void store_page(const __grid_constant__ Page<Job, capacity> page, int count, Job* table) {
  copy_page(page, count, table);
}

constexpr int kSmallPage = 4;

template <class A, class B, class C>
__global__ void store_small_pages(const __grid_constant__ Page<A, kSmallPage> a, int a_count, A* a_table,
                                  const __grid_constant__ Page<B, kSmallPage> b, int b_count, B* b_table,
                                  const __grid_constant__ Page<C, kSmallPage> c, int c_count, C* c_table) {
  copy_page(a, a_count, a_table);
  copy_page(b, b_count, b_table);
  copy_page(c, c_count, c_table);
}

template <int capacity, class Job>
void store_pages(const std::vector<Job>& jobs, Job* table, cudaStream_t stream) {
  for (size_t first = 0; first < jobs.size(); first += capacity) {
    Page<Job, capacity> page;
    const int count = int(jobs.size() - first < capacity ? jobs.size() - first : capacity);
    for (int i = 0; i < count; ++i) page.job[i] = jobs[first + i];
    store_page<<<unsigned(capacity <= kSmallPage ? 1 : 8), 256, 0, stream>>>(page, count, table + first);
  }
}

// Small pages for small models: the argument is copied whole at every launch.
template <class Job>
void store_table(const std::vector<Job>& jobs, Job* table, cudaStream_t stream) {
  constexpr int most = 30000 / int(sizeof(Job)) / 8 * 8;
  if (jobs.size() <= kSmallPage) {
    store_pages<kSmallPage>(jobs, table, stream);
  } else if (jobs.size() <= most / 4) {
    store_pages<most / 4>(jobs, table, stream);
  } else {
    store_pages<most>(jobs, table, stream);
  }
}

// Three tables, in one launch for small models.
template <class A, class B, class C>
void store_tables(const std::vector<A>& a, A* a_table, const std::vector<B>& b, B* b_table, const std::vector<C>& c,
                  C* c_table, cudaStream_t stream) {
  if (std::max({a.size(), b.size(), c.size()}) > kSmallPage) {
    store_table(a, a_table, stream);
    store_table(b, b_table, stream);
    store_table(c, c_table, stream);
    return;
  }
  const auto page = [](const auto& jobs, auto& page) { std::copy(jobs.begin(), jobs.end(), page.job); };
  Page<A, kSmallPage> a_page;
  Page<B, kSmallPage> b_page;
  Page<C, kSmallPage> c_page;
  page(a, a_page), page(b, b_page), page(c, c_page);
  store_small_pages<<<4, 256, 0, stream>>>(a_page, int(a.size()), a_table, b_page, int(b.size()), b_table, c_page,
                                           int(c.size()), c_table);
}

// The job whose range of block (or warp) numbers holds `index`: first[i] ascends with i.
template <class Job>
__device__ __forceinline__ const Job& find_job(const Job* table, int count, int64_t index, int64_t Job::* first) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].*first <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table[low];
}

__device__ __forceinline__ void add(int64_t* total, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ void count_nonfinite(int64_t* counts, int64_t step, int64_t samples) {
  add(counts + k_nonfinite, samples);
  atomicCAS(reinterpret_cast<unsigned long long*>(counts + k_first_bad_step), ~0ull,
            static_cast<unsigned long long>(step));
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_down_sync(0xffffffffu, v, lane);
  return v;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }

// The lanes of tree_sum<32> are a warp: lane l adds l, l + 32, ...; the tree is a shuffle tree in the same order.
__device__ __forceinline__ double warp_tree(double v) {
  for (int half = 16; half > 0; half /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, v, half);
    v += other;  // lanes below `half` hold lane[l] + lane[l + half]; the others are not read
  }
  return __shfl_sync(0xffffffffu, v, 0);
}

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace lrtt::cuda
