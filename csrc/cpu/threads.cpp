// Runs the kernels' tasks on torch's threads.
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "kernels.h"

namespace rnnfast {
namespace {

// A forked child has none of its parent's threads, and an OpenMP pool of the parent's would wait for them forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  if (forked) return body(context, 0, tasks);
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace rnnfast
