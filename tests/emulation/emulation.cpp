// The fibres and their schedule, and each instruction in terms of them. emulation.h says what is emulated.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.cuh"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...) void()
#define __sanitizer_finish_switch_fiber(...) void()
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace rnnfast {
namespace {

constexpr int kProcessors = 36, kMaxThreads = 1024, kMaxCluster = 16, kWarp = 32;
constexpr size_t kMaxShared = 227 << 10;
constexpr int kAlive = 4;                                // clusters of an ordinary launch at once
constexpr int kIdlePolls = 1000;                         // of each thread, with nothing else happening: a deadlock
constexpr size_t kGuard = 64 << 10, kStack = 256 << 10;  // of which the system provides the pages that are touched

template <class... Parts>
std::runtime_error error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return std::runtime_error(text.str());
}

// ---- what a launch consists of

// A stack on which one CUDA thread after another runs; also that of the launch's caller.
struct Fibre {
  const void* stack;
  size_t size;
  void* fake_stack;  // AddressSanitizer's
#ifdef __x86_64__
  void** top;
#else
  ucontext_t context;
#endif
};

struct Thread {
  struct Block* block;
  int index;
  Fibre* fibre = nullptr;           // null: has not started
  const char* waits_for = nullptr;  // null: is ready, runs or has exited
  const struct Barrier* barrier = nullptr;
  uint32_t parity = 0;
  bool has_unfenced_barriers = false;
};

enum class Product { kBFloat16, kHalf, kTf32, kDouble, kNone };  // kNone: lanes swap values

struct Warp {
  int arrived;
  Product product;
  uint32_t a[4][kWarp], b[2][kWarp];
  float values[kWarp];  // to be swapped
  double factors[2][kWarp], double_sums[8][8];
  alignas(32) float sums[16][8];  // two of each lane in the upper half, lane by lane, and two in the lower half
};

// An mbarrier, in its 8 bytes of shared memory.
struct Barrier {
  static constexpr uint8_t kMark = 0xb5;
  int32_t bytes;  // to come; below 0 where they came before they were expected
  uint16_t phase;
  uint8_t arrivals;  // to come
  uint8_t mark;      // kMark once it is initialised
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "or it would not lie there");

struct Block {
  struct Cluster* cluster;
  int64_t index;
  int rank, arrived, exited;
  char* shared;  // null once all threads have exited
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

struct Cluster {
  int arrived, exited;
  std::vector<Block> blocks;
};

struct Store {  // on its way
  Block* block;
  uint4 value;
  char* to;
  Barrier* barrier;
};

struct Cancelled {};  // unwinds the other threads of a launch that failed

#ifdef __x86_64__
// swapcontext() without its system calls. A jump would do as well, but calls and returns have to stay paired: otherwise
// the processor predicts each return wrong, and a switch takes three times as long.
__attribute__((naked, noinline)) void switch_stacks(void***, void**) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n\t"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#endif

// ---- one launch after another

struct Emulation {
  std::mutex mutex;
  bool is_random = false;
  uint64_t random_state = 0;

  Launch launch;
  const std::function<void()>* body;
  std::vector<Cluster> clusters;        // that are alive
  std::vector<int64_t> order;           // the numbers of all clusters
  size_t begun;                         // of `order`
  std::vector<Thread*> ready, pollers;  // all threads but the running one and those that wait for something else
  std::vector<Store> stores;
  uint32_t eagerness;          // a store arrives at so many quarters of the switches, and when nothing else can go on
  int64_t live;                // threads that have not exited
  int64_t idle_polls;          // since anything else happened
  std::exception_ptr failure;  // of this launch

  Thread* current;
  Fibre caller, *running = &caller, *left;
  std::deque<Fibre> fibres;  // kept, because a stack costs some system calls and page faults
  std::vector<Fibre*> idle_fibres;

  uint32_t random(size_t below) {
    random_state = random_state * 6364136223846793005 + 1442695040888963407;
    return (random_state >> 32) * below >> 32;
  }

  template <class T>
  static T take(std::vector<T>& from, size_t i) {
    T taken = std::exchange(from[i], from.back());
    from.pop_back();
    return taken;
  }

  // ---- fibres

  void switch_to(Fibre& next) {
    Fibre& self = *running;
    left = &self;
    running = &next;
    __sanitizer_start_switch_fiber(&self.fake_stack, next.stack, next.size);
#ifdef __x86_64__
    switch_stacks(&self.top, next.top);
#else
    swapcontext(&self.context, &next.context);
#endif
    __sanitizer_finish_switch_fiber(self.fake_stack, &left->stack, &left->size);
  }

  Fibre* make_fibre();

  void resume(Thread& thread) {
    if (!thread.fibre) thread.fibre = idle_fibres.empty() ? make_fibre() : take(idle_fibres, idle_fibres.size() - 1);
    become(thread);
    switch_to(*thread.fibre);
  }

  void become(Thread& thread) {
    current = &thread;
    threadIdx.x = thread.index;
    blockIdx.x = thread.block->index;
  }

  // A fibre's life: threads, each to its end.
  [[noreturn]] void run_threads() {
    __sanitizer_finish_switch_fiber(nullptr, &left->stack, &left->size);
    for (;;) {
      try {
        if (!failure) (*body)();
      } catch (Cancelled) {
      } catch (...) {
        fail(std::current_exception());
      }
      exit();
      Thread* thread = next();
      if (thread && !thread->fibre) {
        thread->fibre = running;
        become(*thread);
      } else {
        idle_fibres.push_back(running);
        thread ? resume(*thread) : switch_to(caller);
      }
    }
  }

  // ---- the schedule

  // The thread to run now; null when there is none left. The ready ones are a stack: without a seed, those that were
  // woken last go on, and a thread starts only when all others wait.
  Thread* next() {
    for (;;) {
      if (!stores.empty() && (ready.empty() || random(4) < eagerness)) {
        deliver(take(stores, random(stores.size())));
      } else if (!ready.empty()) {
        if (is_random && !pollers.empty() && random(4) == 0) wake(*take(pollers, random(pollers.size())));
        return take(ready, is_random ? random(ready.size()) : ready.size() - 1);
      } else if (live == 0) {
        return nullptr;
      } else if (pollers.empty() || idle_polls > kIdlePolls * live) {
        fail(std::make_exception_ptr(error("deadlock: ", describe_waits())));
      } else {
        for (Thread* thread : pollers) wake(*thread);
        pollers.clear();
      }
    }
  }

  // The running thread, at an instruction that others take part in.
  Thread& self() {
    if (failure) throw Cancelled();
    return *current;
  }

  void wait(const char* waits_for) {
    idle_polls = 0;
    current->waits_for = waits_for;
    give_way();
  }

  void give_way() {
    Thread& thread = *current;
    Thread* other = next();
    if (other != &thread) resume(*other);
    if (failure) throw Cancelled();
  }

  // Where others could see that only a part is done.
  void maybe_give_way() {
    if (!is_random || random(8)) return;
    ready.push_back(current);
    give_way();
  }

  void wake(Thread& thread) {
    if (!thread.waits_for) return;
    thread.waits_for = nullptr;
    thread.barrier = nullptr;
    ready.push_back(&thread);
  }

  // Backwards, because the last one woken is the first to go on.
  void wake(Block& block, int first, int count) {
    for (int i = first + count; i-- > first;) wake(block.threads[i]);
  }

  void fail(std::exception_ptr exception) {
    if (!failure) failure = exception;
    stores.clear();
    pollers.clear();
    for (Cluster& cluster : clusters) {
      for (Block& block : cluster.blocks) wake(block, 0, launch.threads);
    }
  }

  std::string describe_waits() {
    std::ostringstream text;
    for (Cluster& cluster : clusters) {
      for (Block& block : cluster.blocks) {
        std::map<std::string, int> counts;
        for (Thread& thread : block.threads) {
          if (thread.waits_for) counts[thread.waits_for + describe(thread.barrier, thread)]++;
        }
        if (counts.empty()) continue;
        if (block.exited) counts["that exited"] = block.exited;
        const char* separator = text.tellp() ? "; block " : "block ";
        text << separator << block.index;
        separator = ": ";
        for (auto& [what, count] : counts) text << std::exchange(separator, ", ") << count << " threads " << what;
      }
    }
    return text.str();
  }

  static std::string describe(const Barrier* barrier, const Thread& thread) {
    if (!barrier) return "";
    const auto offset = reinterpret_cast<const char*>(barrier) - thread.block->shared;
    return "(shared + " + std::to_string(offset) + ", parity " + std::to_string(thread.parity) + ") for " +
           std::to_string(barrier->bytes) + " bytes" + (barrier->arrivals ? " and barrier_expect" : "");
  }

  // ---- the life of a launch and of its blocks

  void run(const Launch& configuration, const std::function<void()>& thread) {
    launch = configuration;
    body = &thread;
    const size_t resident = kProcessors / launch.cluster;
    order.resize(launch.blocks / launch.cluster);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = is_random ? order.size() : 0; i > 1; i--) std::swap(order[i - 1], order[random(i)]);
    clusters.resize(std::min({order.size(), resident, launch.cooperative ? resident : kAlive}));
    eagerness = is_random ? random(4) : 0;
    live = idle_polls = 0;
    failure = nullptr;
    gridDim.x = launch.blocks;
    blockDim.x = launch.threads;
    begun = clusters.size();
    for (size_t i = begun; i-- > 0;) begin(clusters[i], order[i]);
    resume(*next());
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }

  void begin(Cluster& cluster, int64_t number) {
    cluster.arrived = cluster.exited = 0;
    cluster.blocks.resize(launch.cluster);
    for (int rank = launch.cluster; rank-- > 0;) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.index = number * launch.cluster + rank;
      block.rank = rank;
      block.arrived = block.exited = 0;
      block.shared = allocate(launch.shared);
      block.warps.resize((launch.threads + kWarp - 1) / kWarp);
      for (Warp& warp : block.warps) warp.arrived = 0;
      block.threads.resize(launch.threads);
      for (int i = launch.threads; i-- > 0;) {
        block.threads[i] = {&block, i};
        ready.push_back(&block.threads[i]);
      }
    }
    live += launch.cluster * launch.threads;
  }

  // Just as large, so that AddressSanitizer knows of the byte behind it.
  static char* allocate(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, size)) throw std::bad_alloc();
    std::memset(memory, 0xff, size);
    return static_cast<char*>(memory);
  }

  // Of the running thread.
  void exit() {
    Block& block = *current->block;
    idle_polls = 0;
    live--;
    if (++block.exited < launch.threads) return;
    if (std::any_of(stores.begin(), stores.end(), [&](const Store& store) { return store.block == &block; })) {
      fail(std::make_exception_ptr(error("block ", block.index, " exited before a store_async to it arrived")));
    }
    std::free(std::exchange(block.shared, nullptr));
    if (++block.cluster->exited < launch.cluster || failure || begun == order.size()) return;
    begin(*block.cluster, order[begun++]);
  }

  // ---- barriers that count bytes, and what arrives there

  // Where in the block's shared memory an object of an instruction lies.
  size_t offset(const void* pointer, size_t size, const char* instruction) {
    const Block& block = *self().block;
    const size_t offset = static_cast<const char*>(pointer) - block.shared;
    if (offset > launch.shared || launch.shared - offset < size || offset % size) {
      throw error(instruction, ": no place in the shared memory of block ", block.index, ", or not aligned");
    }
    return offset;
  }

  Barrier& barrier(Block& block, size_t offset, const char* instruction) {
    auto& barrier = reinterpret_cast<Barrier&>(block.shared[offset]);
    if (barrier.mark != Barrier::kMark) throw error(instruction, ": no barrier_init in block ", block.index);
    return barrier;
  }

  void advance(Block& block, Barrier& barrier) {
    if (barrier.bytes || barrier.arrivals) return;
    barrier.phase++;
    barrier.arrivals = 1;
    for (Thread& thread : block.threads) {
      if (thread.barrier == &barrier) wake(thread);
    }
  }

  void deliver(const Store& store) {
    idle_polls = 0;
    std::memcpy(store.to, &store.value, sizeof(uint4));
    store.barrier->bytes -= sizeof(uint4);
    advance(*store.block, *store.barrier);
  }
};

Emulation emulation;

Fibre* Emulation::make_fibre() {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) std::abort();
  char* stack = static_cast<char*>(memory) + kGuard;
  const size_t size = kStack - fibres.size() * 128 % 4096;  // or all stacks would use the same few sets of the caches
  Fibre* fibre = &fibres.emplace_back();
  fibre->stack = stack;
  fibre->size = size;
  void (*entry)() = [] { emulation.run_threads(); };
#ifdef __x86_64__
  fibre->top = reinterpret_cast<void**>(stack + size) - 8;
  fibre->top[6] = reinterpret_cast<void*>(entry);  // above six registers, and below where it would return to
#else
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = stack;
  fibre->context.uc_stack.ss_size = size;
  makecontext(&fibre->context, entry, 0);
#endif
  return fibre;
}

// ---- products

template <Product kProduct>
float value(uint32_t bits, int half) {
  const uint16_t x = half ? bits >> 16 : bits;
  if constexpr (kProduct == Product::kBFloat16) return BFloat16(x, BFloat16::from_bits());
  if constexpr (kProduct == Product::kHalf) return Half(x, Half::from_bits());
  return __builtin_bit_cast(float, bits & ~0x1fffu);
}

// Of the eight columns of a product.
using Row = float __attribute__((vector_size(32)));
using Bits = int32_t __attribute__((vector_size(32)));

// sum plus the products as tensor cores add: aligned to the largest of them, cut off one bit below its last, and the
// sum cut off, not rounded (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021: one such bit is the least
// that was seen).
template <int kCount>
Row truncated_sum(Row sum, const Row (&products)[kCount]) {
  const auto magnitude = [](Row x) { return __builtin_bit_cast(Bits, x) & 0x7fffffff; };
  Bits largest = magnitude(sum);
  Row plain = sum;
  for (const Row& product : products) {
    const Bits other = magnitude(product);
    largest = other > largest ? other : largest;
    plain += product;
  }
  Bits exponent = largest >> 23;
  const Bits is_finite = exponent < 255;
  exponent = exponent > 25 ? exponent : exponent * 0 + 25;  // so that the powers of two below are floats
  const Row per_unit = __builtin_bit_cast(Row, (278 - exponent) << 23);
  Bits units = __builtin_convertvector(sum * per_unit, Bits);  // which cuts off
  for (const Row& product : products) units += __builtin_convertvector(product * per_unit, Bits);
  Row cut;
  for (int i = 0; i < 8; i++) {
    const uint64_t bits = __builtin_bit_cast(uint64_t, double(units[i])) & ~((uint64_t(1) << 29) - 1);  // of a float
    cut[i] = float(__builtin_bit_cast(double, bits));
  }
  cut *= __builtin_bit_cast(Row, (exponent - 24) << 23);
  return is_finite ? cut : plain;
}

// A lane stands for a row of a, a column of b and one of four inputs. The inputs are numbered by register, half of a
// register and lane: in another order than the instruction's, but in the same one for both factors.
template <Product kProduct>
void multiply(Warp& warp) {
  constexpr int kHalves = kProduct == Product::kTf32 ? 1 : 2;
  float a[2][kHalves][16][4];
  alignas(Row) float b[2][kHalves][4][8];
  for (int r = 0; r < 2; r++) {
    for (int half = 0; half < kHalves; half++) {
      for (int lane = 0; lane < kWarp; lane++) {
        a[r][half][lane / 4][lane % 4] = value<kProduct>(warp.a[2 * r][lane], half);
        a[r][half][8 + lane / 4][lane % 4] = value<kProduct>(warp.a[2 * r + 1][lane], half);
        b[r][half][lane % 4][lane / 4] = value<kProduct>(warp.b[r][lane], half);
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    Row products[2 * kHalves * 4];
    for (int i = 0; i < 2 * kHalves * 4; i++) {
      const int r = i / 4 / kHalves, half = i / 4 % kHalves, q = i % 4;
      products[i] = a[r][half][row][q] * reinterpret_cast<Row&>(b[r][half][q]);
    }
    Row& sum = reinterpret_cast<Row&>(warp.sums[row]);
    sum = truncated_sum(sum, products);
  }
}

// All lanes leave their parts, the last one computes, and each takes what is its own.
template <class Leave, class Compute>
Warp& together(Product product, const char* waits_for, const Leave& leave, const Compute& compute) {
  Thread& thread = emulation.self();
  const int lane = thread.index % kWarp;
  Warp& warp = thread.block->warps[thread.index / kWarp];
  if (warp.arrived && warp.product != product) throw error("lanes of a warp are at products of different types");
  warp.product = product;
  leave(warp, lane);
  if (++warp.arrived < kWarp) {
    emulation.wait(waits_for);
  } else {
    warp.arrived = 0;
    compute(warp);
    emulation.wake(*thread.block, thread.index - lane, kWarp);
  }
  return warp;
}

int lane() { return emulation.self().index % kWarp; }

template <Product kProduct>
void product(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto leave = [&](Warp& warp, int lane) {
    for (int i = 0; i < 4; i++) warp.a[i][lane] = a[i];
    for (int i = 0; i < 2; i++) warp.b[i][lane] = b[i];
    float* sums = warp.sums[0] + 2 * lane;
    for (int i = 0; i < 4; i++) sums[i / 2 * 64 + i % 2] = sum[i];
  };
  const float* sums = together(kProduct, "at mma", leave, multiply<kProduct>).sums[0] + 2 * lane();
  for (int i = 0; i < 4; i++) sum[i] = sums[i / 2 * 64 + i % 2];
}

// A lane's factors are a[lane / 4, lane % 4] and b[lane % 4, lane / 4].
void multiply_doubles(Warp& warp) {
  for (int row = 0; row < 8; row++) {
    for (int column = 0; column < 8; column++) {
      for (int k = 0; k < 4; k++) {
        double& sum = warp.double_sums[row][column];
        sum = std::fma(warp.factors[0][row * 4 + k], warp.factors[1][column * 4 + k], sum);
      }
    }
  }
}

}  // namespace

float swap_halves(float x) {
  const auto swap = [](Warp& warp) { std::swap_ranges(warp.values, warp.values + kWarp / 2, warp.values + kWarp / 2); };
  // A lane that is quick leaves its own one again.
  const auto leave = [=](Warp& warp, int lane) { warp.values[lane] = x; };
  return together(Product::kNone, "at swap_halves", leave, swap).values[lane()];
}

// ---- the instructions

char* shared_memory() { return emulation.current->block->shared; }

void sync_block() {
  Block& block = *emulation.self().block;
  if (++block.arrived < emulation.launch.threads) return emulation.wait("at sync_block");
  block.arrived = 0;
  emulation.wake(block, 0, emulation.launch.threads);
}

void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, BFloat16) {
  product<Product::kBFloat16>(sum, {a0, a1, a2, a3}, {b0, b1});
}
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Half) {
  product<Product::kHalf>(sum, {a0, a1, a2, a3}, {b0, b1});
}
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float) {
  product<Product::kTf32>(sum, {a0, a1, a2, a3}, {b0, b1});
}

void mma(double& sum0, double& sum1, double a, double b) {
  const auto leave = [&](Warp& warp, int lane) {
    warp.factors[0][lane] = a, warp.factors[1][lane] = b;
    double* sums = warp.double_sums[0] + 2 * lane;
    sums[0] = sum0, sums[1] = sum1;
  };
  const double* sums = together(Product::kDouble, "at mma", leave, multiply_doubles).double_sums[0] + 2 * lane();
  sum0 = sums[0], sum1 = sums[1];
}

int cluster_rank() { return emulation.current->block->rank; }

void sync_cluster() {
  Thread& thread = emulation.self();
  if (thread.has_unfenced_barriers) throw error("barrier_init_fence is missing before sync_cluster");
  Cluster& cluster = *thread.block->cluster;
  if (++cluster.arrived < emulation.launch.cluster * emulation.launch.threads) return emulation.wait("at sync_cluster");
  cluster.arrived = 0;
  for (Block& block : cluster.blocks) emulation.wake(block, 0, emulation.launch.threads);
}

void barrier_init(uint64_t* barrier) {
  const Barrier fresh = {0, 0, 1, Barrier::kMark};
  std::memcpy(emulation.current->block->shared + emulation.offset(barrier, 8, "barrier_init"), &fresh, sizeof(fresh));
  emulation.current->has_unfenced_barriers = true;
}

void barrier_init_fence() { emulation.current->has_unfenced_barriers = false; }

void barrier_expect(uint64_t* pointer, uint32_t bytes) {
  Block& block = *emulation.self().block;
  Barrier& barrier = emulation.barrier(block, emulation.offset(pointer, 8, "barrier_expect"), "barrier_expect");
  if (!barrier.arrivals) throw error("barrier_expect: twice in a phase of a barrier, in block ", block.index);
  barrier.arrivals = 0;
  barrier.bytes += bytes;
  emulation.advance(block, barrier);
}

void barrier_wait(uint64_t* pointer, uint32_t parity) {
  Thread& thread = emulation.self();
  Barrier& barrier = emulation.barrier(*thread.block, emulation.offset(pointer, 8, "barrier_wait"), "barrier_wait");
  while (barrier.phase % 2 == parity) {  // a thread that is two phases late waits again, as on the chip
    thread.barrier = &barrier;
    thread.parity = parity;
    emulation.wait("in barrier_wait");
  }
}

void store_async(void* shared, uint4 value, uint64_t* barrier, int rank) {
  const size_t to = emulation.offset(shared, sizeof(uint4), "store_async");
  const size_t at = emulation.offset(barrier, sizeof(Barrier), "store_async");
  if (rank < 0 || rank >= emulation.launch.cluster) throw error("store_async: no block ", rank, " in the cluster");
  Block& peer = emulation.current->block->cluster->blocks[rank];
  if (!peer.shared) throw error("store_async: block ", peer.index, " has exited");
  emulation.stores.push_back({&peer, value, peer.shared + to, &emulation.barrier(peer, at, "store_async")});
  emulation.maybe_give_way();
}

void store_relaxed(uint64_t* p, uint64_t value) {
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  emulation.idle_polls = 0;
  emulation.maybe_give_way();
}

void load_relaxed(const uint64_t* p, uint64_t (&two)[2]) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw error("load_relaxed: two words that are not aligned");
  two[0] = __atomic_load_n(p, __ATOMIC_RELAXED);
  emulation.maybe_give_way();
  two[1] = __atomic_load_n(p + 1, __ATOMIC_RELAXED);
}

void store_release(uint32_t* p, uint32_t value) {
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  emulation.idle_polls = 0;
  emulation.maybe_give_way();
}

uint32_t load_acquire(const uint32_t* p) {
  emulation.maybe_give_way();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

void store_data(uint4* p, uint4 value) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw error("store_data: 16 bytes that are not aligned");
  std::memcpy(p, &value, sizeof(value));
  emulation.maybe_give_way();
}

void copy_async(void* shared, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) throw error("copy_async: 16 bytes that are not aligned");
  std::memcpy(emulation.current->block->shared + emulation.offset(shared, 16, "copy_async"), from, 16);
  emulation.maybe_give_way();
}

void Patience::wait() {
  Thread& thread = emulation.self();
  thread.waits_for = "polling";
  emulation.idle_polls++;
  emulation.pollers.push_back(&thread);
  emulation.give_way();
}

// ---- the host's side

Chip chip(int) { return {kProcessors, kMaxShared, 9}; }

int resident_clusters(const void*, const Launch& launch) {
  const bool fits = launch.shared <= kMaxShared && launch.threads <= kMaxThreads && launch.cluster <= kMaxCluster;
  return fits ? kProcessors / launch.cluster : 0;
}

int resident_blocks(const void* kernel, const Launch& launch) {
  return resident_clusters(kernel, launch) * launch.cluster;
}

void run(const Launch& launch, const std::function<void()>& thread) {
  if (launch.blocks < 1 || launch.blocks > INT32_MAX || launch.threads < 1 || launch.cluster < 1 ||
      launch.blocks % launch.cluster) {
    throw error("rnnfast: CUDA error: invalid configuration argument");
  }
  const int resident = resident_blocks(nullptr, launch);
  if (!resident) {
    throw error("rnnfast: CUDA error: no place for blocks of ", launch.threads, " threads and ", launch.shared,
                " bytes of shared memory, in clusters of ", launch.cluster);
  }
  if (launch.cooperative && launch.blocks > resident) {
    throw error("rnnfast: CUDA error: too many blocks in cooperative launch");
  }
  std::lock_guard<std::mutex> lock(emulation.mutex);
  emulation.run(launch, thread);
}

}  // namespace rnnfast

void rnnfast_emulation_seed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(rnnfast::emulation.mutex);
  rnnfast::emulation.is_random = seed != 0;
  rnnfast::emulation.random_state = seed;
}
