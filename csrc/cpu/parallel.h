// Threads and memory for the kernels: loops over tasks, crews with barriers, scratch buffers.
#pragma once

#include <sched.h>

#include "amx.h"
#include "kernels.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};
constexpr Range share(int64_t n, int64_t part, int64_t parts) {
  return parts == 1 ? Range{0, n} : Range{n * part / parts, n * (part + 1) / parts};  // a division takes long
}

// Calls body(begin, end) for ranges that make up [0, tasks), in parallel.
template <class Body>
void parallel_ranges(int64_t tasks, const Body& body) {
  auto guarded = [&](int64_t begin, int64_t end) {
    TileGuard guard;
    body(begin, end);
  };
  if (tasks == 1) return guarded(0, 1);
  parallel_tasks(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<decltype(guarded)*>(context))(begin, end); },
      &guarded);
}

template <class Body>
void parallel(int64_t tasks, const Body& body) {
  parallel_ranges(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) body(task);
  });
}

// Calls body(i) for all i < n; neighbours go to one thread.
template <class Body>
void parallel_for(int64_t n, int64_t threads, const Body& body) {
  int64_t tasks = max(1, min(n, threads));
  parallel(tasks, [&](int64_t task) {
    Range r = share(n, task, tasks);
    for (int64_t i = r.begin; i < r.end; i++) body(i);
  });
}

// Threads that go through a program together, with barriers. They spin, so all of them have to be running: they start
// together, or, if some do not turn up in time (an outer parallel region, a busy machine), one does all the tasks
// alone.
class Crew {
 public:
  explicit Crew(int64_t tasks) : tasks_(tasks) {}

  // Calls program(begin, end, barrier) on every member, for its share of the tasks.
  template <class Program>
  void run(const Program& program) {
    parallel_ranges(tasks_, [&](int64_t begin, int64_t end) {
      if (!start_together(begin, end)) return;
      int64_t rounds = 0;
      program(begin, end, [&] {
        if (end - begin == tasks_) return;
        rounds += tasks_;
        __atomic_add_fetch(&passed_, end - begin, __ATOMIC_ACQ_REL);
        wait([&] { return __atomic_load_n(&passed_, __ATOMIC_ACQUIRE) >= rounds; }, INT64_MAX);
      });
    });
  }

 private:
  enum State { kGathering, kTogether, kAlone };

  bool start_together(int64_t& begin, int64_t& end) {
    constexpr int64_t kPatience = 1000;  // yields
    int next = kTogether;
    if (__atomic_add_fetch(&arrived_, end - begin, __ATOMIC_ACQ_REL) < tasks_) {
      if (wait([&] { return __atomic_load_n(&state_, __ATOMIC_ACQUIRE) != kGathering; }, kPatience)) {
        return __atomic_load_n(&state_, __ATOMIC_ACQUIRE) == kTogether;
      }
      next = kAlone;
    }
    int expected = kGathering;
    if (!__atomic_compare_exchange_n(&state_, &expected, next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
      return expected == kTogether;
    }
    if (next == kAlone) begin = 0, end = tasks_;
    return true;
  }

  template <class Done>
  static bool wait(const Done& done, int64_t patience) {
    for (int spins = 0; spins < 2000; spins++) {
      if (done()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    for (; patience > 0; patience--) {
      if (done()) return true;
      sched_yield();
    }
    return false;
  }

  const int64_t tasks_;
  int state_ = kGathering;
  int64_t arrived_ = 0;
  alignas(64) int64_t passed_ = 0;  // tasks at barriers so far
};

template <class Element>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(n ? static_cast<Element*>(allocate(n * sizeof(Element))) : nullptr) {}
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Element*() const { return data_; }

 private:
  Element* data_;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
