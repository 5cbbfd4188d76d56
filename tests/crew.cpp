// A crew (csrc/cpu/parallel.h) of four tasks, some of whose members turn up too late. Prints how often each task was
// done: once, whoever did it, and every second round after all of the first.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu/parallel.h"

namespace rnnfast {

std::vector<int64_t> cuts;  // each member's range ends at one

// One member after the other on a single thread: the first waits in vain for those behind it.
void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  int64_t begin = 0;
  for (int64_t end : cuts) body(context, begin, end), begin = end;
}

}  // namespace rnnfast

int main() {
  using namespace rnnfast;
  alarm(300);  // seconds: a barrier that is never passed
  for (std::vector<int64_t> members : {std::vector<int64_t>{4}, {1, 4}, {2, 4}, {1, 2, 3, 4}}) {
    cuts = members;
    int done[2][4] = {};
    RNNFAST_ISA::Crew(4).run([&](int64_t begin, int64_t end, const auto& barrier) {
      for (int round = 0; round < 2; round++) {
        for (int64_t task = begin; task < end; task++) done[round][task]++;
        barrier();
        for (int task = 0; task < 4; task++) {
          if (!done[round][task]) std::exit(1);
        }
      }
    });
    for (const auto& round : done) std::printf("%d%d%d%d ", round[0], round[1], round[2], round[3]);
  }
}
