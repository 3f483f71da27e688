#include "barrier.h"

#include <chrono>
#include <climits>
#include <thread>

#ifdef __linux__
#  include <linux/futex.h>
#  include <sys/syscall.h>
#  include <time.h>
#  include <unistd.h>
#endif

namespace lrtt::cpu {
namespace {

using Clock = std::chrono::steady_clock;
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

// Sleeps until `word` may differ from `seen`, for a slice at most: barrier_fail may wake a moment too early.
void sleep_on(std::atomic<uint32_t>* word, uint32_t seen, std::chrono::nanoseconds most) {
  const std::chrono::nanoseconds slice = most < std::chrono::milliseconds(50) ? most : std::chrono::milliseconds(50);
#ifdef __linux__
  const timespec limit{time_t(slice.count() / 1000000000), long(slice.count() % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &limit, nullptr, 0);
#else
  (void)word, (void)seen;
  std::this_thread::sleep_for(slice < std::chrono::microseconds(50) ? slice : std::chrono::microseconds(50));
#endif
}

void wake_all(std::atomic<uint32_t>* word) {
#ifdef __linux__
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

void barrier_init(Barrier* b, int workers) {
  b->generation.store(0);
  b->arrived.store(0);
  b->failed.store(0);
  for (int i = 0; i < kBarrierWorkers; ++i) b->stamp[i].store(0);
  b->size.store(uint32_t(workers));
}

uint32_t barrier_arrive(Barrier* b, int rank) {
  const uint32_t meeting = b->generation.load(std::memory_order_acquire) + 1;
  b->stamp[rank].store(meeting, std::memory_order_relaxed);
  // acq_rel: the last one has seen what all others wrote before they came, and hands it on with `generation`.
  if (b->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == b->size.load(std::memory_order_relaxed)) {
    b->arrived.store(0, std::memory_order_relaxed);
    b->generation.store(meeting, std::memory_order_release);
    wake_all(&b->generation);
  }
  return meeting;
}

int barrier_wait(Barrier* b, uint32_t meeting, int milliseconds) {
  const Clock::time_point end = Clock::now() + std::chrono::milliseconds(milliseconds);
  for (int spin = 0;; ++spin) {
    const uint32_t now = b->generation.load(std::memory_order_acquire);
    if (int32_t(now - meeting) >= 0) return kMet;
    if (b->failed.load(std::memory_order_acquire)) return kFailed;
    if (spin < 64) continue;  // a few hundred nanoseconds; workers that meet at once need no system call
    const auto left = end - Clock::now();
    if (left <= std::chrono::nanoseconds(0)) return kTimeout;
    sleep_on(&b->generation, now, left);
  }
}

void barrier_fail(Barrier* b, int rank) {
  uint32_t none = 0;
  b->failed.compare_exchange_strong(none, uint32_t(rank) + 1, std::memory_order_acq_rel);
  wake_all(&b->generation);
}

}  // namespace lrtt::cpu
