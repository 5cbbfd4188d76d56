// The chip's instructions and the runtime's calls that the kernels are made of, a wrapper each. A host compiler gets
// the same names from an emulation, with which the tests run these very kernels on a CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>

namespace rnnfast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// A launch: so many blocks in clusters of so many, each with so many threads and bytes of shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  size_t shared;
  int cluster;       // 1: none
  bool cooperative;  // all blocks at once, or an error
  int device;
  int64_t stream;  // a cudaStream_t
};

// Of a device; of number -1, which no device has, an H200's, for plans that are only looked at.
struct Chip {
  int processors;
  size_t shared;  // bytes that a block can have
  int major;      // of the compute capability
};

}  // namespace rnnfast

#ifndef __CUDACC__
#define RNNFAST_ON_GPU false
#include "emulation.h"
#else
#define RNNFAST_ON_GPU true

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define RNNFAST_DEVICE __device__ __forceinline__

namespace rnnfast {

// ---- a block

RNNFAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

RNNFAST_DEVICE void sync_block() { __syncthreads(); }

RNNFAST_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// threadIdx.x, kept in a register: the compiler would read the slow special one wherever it is used.
RNNFAST_DEVICE int thread_of_block() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same number, but the compiler does not know that. What depends on it is so computed where it stands, and not once
// before a loop, which would keep it in registers all along.
RNNFAST_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What the lane 16 above or below has; all lanes take part.
RNNFAST_DEVICE float swap_halves(float x) { return __shfl_xor_sync(0xffffffff, x, 16); }

// ---- products: sum[16, 8] += a[16, k] b[k, 8], by a warp; k is 16 in 16 bit and 8 in TF32

#define RNNFAST_MMA(Value, SHAPE)                                                                             \
  RNNFAST_DEVICE void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,   \
                          uint32_t b1, Value) {                                                               \
    asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                     \
  }
RNNFAST_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RNNFAST_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
RNNFAST_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RNNFAST_MMA

// sum[8, 8] += a[8, 4] b[4, 8], of which a lane has two sums and a value of either factor.
RNNFAST_DEVICE void mma(double& sum0, double& sum1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum0), "+d"(sum1)
               : "d"(a), "d"(b));
}

RNNFAST_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- maths, good to a few units in the last place

RNNFAST_DEVICE float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.4426950408889634f * x));
  return y;
}

RNNFAST_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

// ---- polling

// What a loop does after a poll that failed. In debug builds a poll that never succeeds ends the kernel.
class Patience {
 public:
  RNNFAST_DEVICE Patience() {
#ifdef RNNFAST_DEBUG
    start_ = clock64();
#endif
  }
  RNNFAST_DEVICE void wait() {
#ifdef RNNFAST_DEBUG
    if (clock64() - start_ > 4'000'000'000) __trap();
#endif
  }

 private:
#ifdef RNNFAST_DEBUG
  long long start_;
#endif
};

// ---- a cluster: barriers that count bytes, and stores into a peer's shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

RNNFAST_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

RNNFAST_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

RNNFAST_DEVICE void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

RNNFAST_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The one arrival of a phase, which ends once so many bytes have come as well.
RNNFAST_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

RNNFAST_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  for (Patience patience;; patience.wait()) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done) return;
  }
}

// 16 bytes to where `shared` lies in a peer, ordered by nothing but the peer's barrier, which counts them.
RNNFAST_DEVICE void store_async(void* shared, uint4 value, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n\t.reg .u32 to, at;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 at, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [at];\n\t}" ::"r"(
          shared_address(shared)),
      "r"(shared_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

#else  // before Hopper there are no clusters, and no kernel that uses them is launched

RNNFAST_DEVICE int cluster_rank() { return 0; }
RNNFAST_DEVICE void sync_cluster() { __trap(); }
RNNFAST_DEVICE void barrier_init(uint64_t*) { __trap(); }
RNNFAST_DEVICE void barrier_init_fence() {}
RNNFAST_DEVICE void barrier_expect(uint64_t*, uint32_t) {}
RNNFAST_DEVICE void barrier_wait(uint64_t*, uint32_t) {}
RNNFAST_DEVICE void store_async(void*, uint4, uint64_t*, int) {}

#endif

// ---- the grid: words in L2 that other blocks write

RNNFAST_DEVICE void store_relaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// Each word is read whole, but the two not at one time.
RNNFAST_DEVICE void load_relaxed(const uint64_t* p, uint64_t (&two)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(two[0]), "=l"(two[1]) : "l"(p) : "memory");
}

// Of words that say how far others have come: what a thread of theirs stored before is seen by who has seen the word.
RNNFAST_DEVICE void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

RNNFAST_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

RNNFAST_DEVICE void store_data(uint4* p, uint4 value) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// 16 bytes from L2 to shared memory, where they are after copies_done().
RNNFAST_DEVICE void copy_async(void* shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(from) : "memory");
}

RNNFAST_DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- the host's side

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of anybody would report it again
  STD_TORCH_CHECK(false, "rnnfast: CUDA error: ", cudaGetErrorString(error));
}

// This library has a runtime of its own, beside torch's: it has to be told of the device.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_;
};

inline Chip chip(int device) {
  if (device < 0) return {132, 227 << 10, 9};
  auto attribute = [=](cudaDeviceAttr name) {
    int value;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          attribute(cudaDevAttrComputeCapabilityMajor)};
}

// Lifts the limits of a kernel, once for each device. They are the kernel's and not a launch's: one set to what its own
// launch needs would be in the way of another thread's larger one.
inline void allow_every_launch(const void* kernel, int device) {
  static std::set<std::pair<const void*, int> > done;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  const Chip limits = chip(device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared));
  if (limits.major >= 9) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  done.insert({kernel, device});
}

// A Launch in the runtime's terms.
class Configuration : public cudaLaunchConfig_t {
 public:
  Configuration(const void* kernel, const Launch& launch) : cudaLaunchConfig_t{} {
    gridDim = dim3(launch.blocks), blockDim = dim3(launch.threads);
    dynamicSmemBytes = launch.shared;
    stream = reinterpret_cast<cudaStream_t>(launch.stream);
    attrs = attributes_;
    if (launch.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes_[numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = launch.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (launch.cooperative) {
      cudaLaunchAttribute& cooperative = attributes_[numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
    allow_every_launch(kernel, launch.device);
  }
  Configuration(const Configuration&) = delete;

 private:
  cudaLaunchAttribute attributes_[2];
};

// How many blocks of such a launch the device holds at once; of clusters, how many clusters.
inline int resident_blocks(const void* kernel, const Launch& launch) {
  if (launch.device < 0) return chip(launch.device).processors;
  OnDevice on(launch.device);
  Configuration configuration(kernel, launch);
  int blocks;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, launch.threads, launch.shared));
  return blocks * chip(launch.device).processors;
}

inline int resident_clusters(const void* kernel, const Launch& launch) {
  if (launch.device < 0) return chip(launch.device).processors / launch.cluster;
  OnDevice on(launch.device);
  Configuration configuration(kernel, launch);
  int clusters;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Launch& launch, const Arguments& arguments) {
  OnDevice on(launch.device);
  Configuration configuration(reinterpret_cast<const void*>(kernel), launch);
  check(cudaLaunchKernelEx(&configuration, kernel, Arguments(arguments)));
}

}  // namespace rnnfast

#endif
