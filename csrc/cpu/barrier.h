// A barrier for processes of one host that share a page of memory.
//
// Waiting is a futex, so that more workers than cores do not spin against the one that works, and it has a time limit,
// so that nobody waits for the dead. `stamp` tells who is missing.
#pragma once

#include <atomic>
#include <cstdint>

namespace lrtt::cpu {

constexpr int kBarrierWorkers = 1024;

struct Barrier {
  std::atomic<uint32_t> generation;  // futex word: counts completed meetings
  std::atomic<uint32_t> arrived;
  std::atomic<uint32_t> failed;  // 1 + rank of the worker that gave up; 0: none
  std::atomic<uint32_t> size;
  std::atomic<uint32_t> stamp[kBarrierWorkers];  // the meeting that a worker came to last, counted from 1
};

enum BarrierResult { kMet = 0, kTimeout = 1, kFailed = 2 };

void barrier_init(Barrier* b, int workers);
// Reports the worker at the barrier; returns the meeting that it then waits for.
uint32_t barrier_arrive(Barrier* b, int rank);
int barrier_wait(Barrier* b, uint32_t meeting, int milliseconds);
// Wakes everybody for good.
void barrier_fail(Barrier* b, int rank);

}  // namespace lrtt::cpu
