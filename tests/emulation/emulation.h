// What csrc/cuda/device.cuh offers, for a host compiler: the kernels of csrc/cuda run as they are, for tests without a
// GPU. Included by device.cuh where nvcc does not compile it; `-I tests/emulation` finds it.
//
// A CUDA thread is a fibre, and all fibres of a launch share one thread of the system. A fibre runs until it has to
// wait for another one; who runs next is a fixed order, or after rnnfast_emulation_seed() a random one.
//
// Emulated are
//   - which blocks are alive at once: all of a cooperative launch and of a cluster, a handful of any other launch
//   - barriers of block and cluster, and barriers that count bytes; asynchronous stores, which arrive as late as can be
//     or, with a seed, any time and in any order
//   - shared memory: of a block's own, just as large as asked for, uninitialised bytes 0xFF. A build with
//     AddressSanitizer reports what lies beyond it
//   - the products of a warp: exact products, float32 sums; of float64 plain ones
// and these end a launch with std::runtime_error: a deadlock, also one of threads that poll, with what each thread
// waits for; a store into a block that has exited; a second arrival in a phase of a barrier; a launch that the chip
// refuses. A thread that exited is missing at the barriers of its block and cluster; the hardware would forgive it.
//
// Not emulated: the order in which plain loads and stores of a thread are seen by another one (they are never
// reordered, and between two waits never interleaved), the rounding of the products' sums, approximate maths, and time.
#pragma once

#include <cmath>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define RNNFAST_DEVICE __device__ __forceinline__

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;  // of the running fibre

namespace rnnfast {

char* shared_memory();
void sync_block();
inline int thread_of_block() { return int(threadIdx.x); }
inline int anew(int x) { return x; }

float swap_halves(float x);

void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, BFloat16);
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Half);
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float);
void mma(double& sum0, double& sum1, double a, double b);

inline uint32_t to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffe000;
  return (__builtin_bit_cast(uint32_t, x) + 0x1000) & ~0x1fffu;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }

int cluster_rank();
void sync_cluster();
void barrier_init(uint64_t* barrier);
void barrier_init_fence();
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void store_async(void* shared, uint4 value, uint64_t* barrier, int rank);

void store_relaxed(uint64_t* p, uint64_t value);
void load_relaxed(const uint64_t* p, uint64_t (&two)[2]);

void store_release(uint32_t* p, uint32_t value);
uint32_t load_acquire(const uint32_t* p);
void store_data(uint4* p, uint4 value);
void copy_async(void* shared, const void* from);
inline void copies_done() {}

class Patience {
 public:
  void wait();
};

class OnDevice {
 public:
  explicit OnDevice(int) {}
};

Chip chip(int device);
int resident_blocks(const void* kernel, const Launch& launch);
int resident_clusters(const void* kernel, const Launch& launch);

void run(const Launch& launch, const std::function<void()>& thread);

template <class Arguments>
void launch(void (*kernel)(Arguments), const Launch& launch, const Arguments& arguments) {
  static_assert(std::is_trivially_copyable<Arguments>::value && sizeof(Arguments) <= 4096, "CUDA takes no others");
  run(launch, [&] { kernel(arguments); });
}

}  // namespace rnnfast

// 0, as at first: a fixed order. Any other: a random one.
extern "C" __attribute__((visibility("default"))) void rnnfast_emulation_seed(uint64_t seed);
