// What concerns cells one by one: drawing them, programming, reset, decay and diffusion; and the versions of the CUDA
// runtime and driver.
#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) draw(const cpu::CellsJob job, float* out) {
  const int64_t size = int64_t(job.m) * job.n, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  with_device(int(job.device.kind), [&](auto device) {
    const Cell c = draw_cell<decltype(device)>(job.device, uint64_t(job.state[kKey]), uint32_t(job.array), uint32_t(i));
    const float number[kCellNumbers] = {c.b_max, c.b_min, c.s_up, c.s_dn, c.e0, c.e1, c.e2};
#pragma unroll
    for (int f = 0; f < kCellNumbers; ++f) out[f * size + i] = number[f];
  });
}

__global__ void __launch_bounds__(kThreads) clip_cells(const cpu::CellsJob job, int write, int64_t* total) {
  const Held held = job.held();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  bool at = false;
  if (i < held.size) {
    with_device(int(job.device.kind), [&](auto device) {
      at = at_bound<decltype(device)>(job.device, job.id(i), held, write != 0);
      if (write) set_cell<decltype(device)>(job.device, job.id(i), held, held.w[i], kBySet, uint32_t(job.state[kStep]));
    });
  }
  const int count = __syncthreads_count(at);
  if (threadIdx.x == 0 && count) add(total, count);
}

__global__ void __launch_bounds__(kThreads) reset_cells(const cpu::CellsJob job, const cpu::ResetRange range) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.held().size || i % job.n < range.first || i % job.n >= range.last) return;
  with_device(int(job.device.kind), [&](auto device) {
    reset_cell<decltype(device)>(job.device, job.id(i), job.held(), range.share, range.number,
                                 uint32_t(job.state[kStep]));
  });
}

struct DeviceRelax {
  cpu::CellsJob job;
  int64_t first_block;
};

__global__ void __launch_bounds__(kThreads) relax_cells(const DeviceRelax* table, int count) {
  const DeviceRelax& p = find_job(table, count, int64_t(blockIdx.x), &DeviceRelax::first_block);
  const int64_t i = (int64_t(blockIdx.x) - p.first_block) * kThreads + threadIdx.x;
  if (i >= p.job.held().size) return;
  with_device(int(p.job.device.kind), [&](auto device) {
    relax_cell<decltype(device)>(p.job.device, p.job.id(i), p.job.held(), uint32_t(p.job.state[kStep]));
  });
}

}  // namespace

size_t workspace_bytes(const std::vector<cpu::CellsJob>& jobs) {
  Arena arena(nullptr);
  arena.take<DeviceRelax>(jobs.size());
  return arena.used();
}

void relax(const std::vector<cpu::CellsJob>& list, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  DeviceRelax* table = Arena(workspace).take<DeviceRelax>(list.size());
  std::vector<DeviceRelax> jobs;
  int64_t blocks = 0;
  for (const cpu::CellsJob& job : list) {
    jobs.push_back(DeviceRelax{job, blocks});
    blocks += blocks_of(job.held().size, kThreads);
  }
  store_table(jobs, table, stream);
  relax_cells<<<unsigned(blocks), kThreads, 0, stream>>>(table, int(jobs.size()));
  check(cudaGetLastError(), "relax");
}

void draw_cells(const cpu::CellsJob& job, float* out, Stream stream) {
  const int64_t blocks = blocks_of(int64_t(job.m) * job.n, kThreads);
  if (blocks == 0) return;
  draw<<<unsigned(blocks), kThreads, 0, native(stream)>>>(job, out);
  check(cudaGetLastError(), "draw_cells");
}

void clip(const cpu::CellsJob& job, bool write, int64_t* total, Stream stream) {
  const int64_t blocks = blocks_of(int64_t(job.m) * job.n, kThreads);
  if (blocks == 0) return;
  clip_cells<<<unsigned(blocks), kThreads, 0, native(stream)>>>(job, write, total);
  check(cudaGetLastError(), "clip");
}

void reset(const cpu::CellsJob& job, const cpu::ResetRange& range, Stream stream) {
  const int64_t blocks = blocks_of(job.held().size, kThreads);
  if (blocks == 0) return;
  reset_cells<<<unsigned(blocks), kThreads, 0, native(stream)>>>(job, range);
  check(cudaGetLastError(), "reset");
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace lrtt::cuda
