// What concerns cells one by one: drawing them, clipping to bounds, decay and diffusion; and the versions of the CUDA runtime and driver.
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

__global__ void __launch_bounds__(kThreads) clip_cells(const cpu::CellsJob job, float* w, int write, int64_t* at_bound) {
  const int64_t size = int64_t(job.m) * job.n, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  bool at = false;
  if (i < size) {
    with_device(int(job.device.kind), [&](auto device) {
      const Cell c = draw_cell<decltype(device)>(job.device, uint64_t(job.state[kKey]), uint32_t(job.array), uint32_t(i));
      at = w[i] >= c.b_max || w[i] <= c.b_min;
      if (write) w[i] = into_bounds(c, w[i]);
    });
  }
  const int count = __syncthreads_count(at);
  if (threadIdx.x == 0 && count) add(at_bound, count);
}

struct DeviceRelax {
  cpu::RelaxJob job;
  int64_t first_block;
};

__global__ void __launch_bounds__(kThreads) relax_cells(const DeviceRelax* table, int count) {
  const DeviceRelax& p = find_job(table, count, int64_t(blockIdx.x), &DeviceRelax::first_block);
  const cpu::CellsJob& cells = p.job.cells;
  const int64_t i = (int64_t(blockIdx.x) - p.first_block) * kThreads + threadIdx.x;
  if (i >= int64_t(cells.m) * cells.n) return;
  const CellId id{uint64_t(cells.state[kKey]), uint32_t(cells.array), uint32_t(i)};
  with_device(int(cells.device.kind), [&](auto device) {
    const Cell c = draw_cell<decltype(device)>(cells.device, id.key, id.array, id.cell);
    p.job.w[i] = relax(cells.device, c, id, p.job.w[i], uint32_t(cells.state[kStep]));
  });
}

}  // namespace

size_t workspace_bytes(const std::vector<cpu::RelaxJob>& jobs) {
  Arena arena(nullptr);
  arena.take<DeviceRelax>(jobs.size());
  return arena.used();
}

void relax(const std::vector<cpu::RelaxJob>& list, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  DeviceRelax* table = Arena(workspace).take<DeviceRelax>(list.size());
  std::vector<DeviceRelax> jobs;
  int64_t blocks = 0;
  for (const cpu::RelaxJob& job : list) {
    jobs.push_back(DeviceRelax{job, blocks});
    blocks += blocks_of(int64_t(job.cells.m) * job.cells.n, kThreads);
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

void clip(const cpu::CellsJob& job, float* w, bool write, int64_t* at_bound, Stream stream) {
  const int64_t blocks = blocks_of(int64_t(job.m) * job.n, kThreads);
  if (blocks == 0) return;
  clip_cells<<<unsigned(blocks), kThreads, 0, native(stream)>>>(job, w, write, at_bound);
  check(cudaGetLastError(), "clip");
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
