// Scratch memory for the kernels, kept from one call to the next.
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace rnnfast {
namespace {

// Blocks that were given back are used again: the system takes as long to hand out fresh pages as a good part of a
// short backward pass takes. Small ones are left to malloc, as aligned_alloc does not keep blocks at hand.
class ScratchPool {
 public:
  void* allocate(size_t bytes) {
    if (bytes > kSmall) {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        if (block->bytes >= bytes && (best == free_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != free_.end() && best->bytes <= 2 * bytes) {
        void* memory = best->memory;
        kept_ -= best->bytes;
        free_.erase(best);
        return memory;
      }
    }
    void* origin = std::malloc(sizeof(Header) + 63 + bytes);
    if (!origin) throw std::bad_alloc();
    const uintptr_t memory = (reinterpret_cast<uintptr_t>(origin) + sizeof(Header) + 63) / 64 * 64;
    reinterpret_cast<Header*>(memory)[-1] = {bytes, origin};
    return reinterpret_cast<void*>(memory);
  }

  void release(void* memory) {
    if (!memory) return;
    Block block{static_cast<Header*>(memory)[-1].bytes, memory};
    if (block.bytes <= kSmall || block.bytes > kKept) return drop(block);
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    for (kept_ += block.bytes; kept_ > kKept; free_.erase(free_.begin())) {  // the oldest goes first
      kept_ -= free_.front().bytes;
      drop(free_.front());
    }
  }

 private:
  static constexpr size_t kSmall = 64 << 10, kKept = 64 << 20;
  struct Header {  // before the memory, which begins at a multiple of 64
    size_t bytes;
    void* origin;
  };
  struct Block {
    size_t bytes;
    void* memory;
  };
  static void drop(Block block) { std::free(static_cast<Header*>(block.memory)[-1].origin); }

  std::mutex mutex_;
  std::vector<Block> free_;
  size_t kept_ = 0;
};

ScratchPool& scratch_pool() {
  static auto* pool = new ScratchPool;  // never destroyed: a thread may outlive static objects
  return *pool;
}

}  // namespace

void* allocate(size_t bytes) { return scratch_pool().allocate(bytes); }

void release(void* memory) { scratch_pool().release(memory); }

}  // namespace rnnfast
