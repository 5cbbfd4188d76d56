// The emulation by itself: `selftest CASE` runs small kernels under several seeds, and prints what came of them.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"

using namespace rnnfast;

namespace {

void expect(bool condition, const char* text) {
  if (!condition) throw std::runtime_error(std::string("wrong: ") + text);
}

struct NoArguments {};

// ---- 32 numbers, each step computed from all of the last one, by 4 blocks that own 8 numbers each

constexpr int kNumbers = 32, kOwn = 8, kBlocks = kNumbers / kOwn, kSteps = 11;

uint32_t advance(const uint32_t* numbers, int i) {
  uint32_t sum = i;
  for (int j = 0; j < kNumbers; j++) sum = sum * 5 + (numbers[j] ^ i);
  return sum;
}

void expect_numbers(const std::vector<uint32_t>& actual) {
  std::vector<uint32_t> numbers(kNumbers), next(kNumbers);
  for (int step = 0; step < kSteps; step++) {
    for (int i = 0; i < kNumbers; i++) next[i] = advance(numbers.data(), i);
    numbers.swap(next);
  }
  for (size_t i = 0; i < actual.size(); i++) expect(actual[i] == numbers[i % kNumbers], "numbers");
}

struct Numbers {
  uint64_t* words;  // [2][kNumbers]
  uint32_t* results;
};

// Through words that hold the number of their step.
void grid_kernel(Numbers a) {
  auto* numbers = reinterpret_cast<uint32_t*>(shared_memory());
  const int thread = threadIdx.x, own = blockIdx.x * kOwn + thread;
  numbers[thread] = 0;
  sync_block();
  for (uint64_t step = 1; step <= kSteps; step++) {
    uint64_t* words = a.words + step % 2 * kNumbers;
    if (thread < kOwn) store_relaxed(words + own, step << 32 | advance(numbers, own));
    sync_block();
    if (thread < kNumbers / 2) {
      uint64_t two[2];
      load_relaxed(words + 2 * thread, two);
      for (Patience patience; two[0] >> 32 != step || two[1] >> 32 != step;) {
        patience.wait();
        load_relaxed(words + 2 * thread, two);
      }
      numbers[2 * thread] = two[0];
      numbers[2 * thread + 1] = two[1];
    }
    sync_block();
  }
  if (thread < kOwn) a.results[own] = numbers[own];
}

void grid() {
  alignas(16) uint64_t words[2 * kNumbers] = {};
  std::vector<uint32_t> results(kNumbers);
  launch(grid_kernel, {kBlocks, kNumbers, kNumbers * 4, 1, true, 0, 0}, Numbers{words, results.data()});
  expect_numbers(results);
}

// Through asynchronous stores into the shared memory of all blocks of the cluster, in turns into one of two arrays.
void cluster_kernel(Numbers a) {
  auto* barriers = reinterpret_cast<uint64_t*>(shared_memory());
  auto* numbers = reinterpret_cast<uint32_t*>(shared_memory() + 16);  // [2][kNumbers]
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory() + 16 + 2 * kNumbers * 4);
  const int thread = threadIdx.x, own = cluster_rank() * kOwn + thread;
  if (thread == 0) {
    barrier_init(barriers);
    barrier_init(barriers + 1);
    barrier_init_fence();
  }
  numbers[thread] = 0;
  sync_cluster();
  for (int step = 1; step <= kSteps; step++) {
    const int to = step % 2;
    if (thread == 0) barrier_expect(barriers + to, kNumbers * 4);
    if (thread < kOwn) mine[thread] = advance(numbers + (1 - to) * kNumbers, own);
    sync_block();
    if (thread < 2 * kBlocks) {  // a half of mine to each block
      const int half = thread % 2 * 4;
      store_async(numbers + to * kNumbers + cluster_rank() * kOwn + half, reinterpret_cast<uint4*>(mine)[thread % 2],
                  barriers + to, thread / 2);
    }
    barrier_wait(barriers + to, (step - 1) / 2 % 2);
    sync_block();
  }
  if (thread < kOwn) a.results[blockIdx.x * kOwn + thread] = numbers[kSteps % 2 * kNumbers + own];
  sync_cluster();
}

void cluster() {
  constexpr int kClusters = 7;
  std::vector<uint32_t> results(kClusters * kNumbers);
  launch(cluster_kernel, {kClusters * kBlocks, kNumbers, 16 + 2 * kNumbers * 4 + kOwn * 4, kBlocks, false, 0, 0},
         Numbers{nullptr, results.data()});
  expect_numbers(results);
}

void neighbours_kernel(Numbers a) {
  auto* numbers = reinterpret_cast<uint32_t*>(shared_memory());
  numbers[threadIdx.x] = threadIdx.x;
  sync_block();
  for (int step = 0; step < kSteps; step++) {
    const uint32_t number = numbers[(threadIdx.x + 1) % blockDim.x];
    sync_block();
    numbers[threadIdx.x] = number;
    sync_block();
  }
  a.results[blockIdx.x * blockDim.x + threadIdx.x] = numbers[threadIdx.x];
}

void neighbours() {
  constexpr int kThreads = 100, kManyBlocks = 9;
  std::vector<uint32_t> results(kManyBlocks * kThreads);
  launch(neighbours_kernel, {kManyBlocks, kThreads, kThreads * 4, 1, false, 0, 0}, Numbers{nullptr, results.data()});
  for (size_t i = 0; i < results.size(); i++) expect(results[i] == (i + kSteps) % kThreads, "neighbours");
}

// ---- sum[16, 8] += a[16, k] b[k, 8]

struct Matrices {
  float first, a[16][16], b[16][8], sums[2][16][8];
};

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(T(high).x) << 16 | T(low).x;
}

template <class T>
void mma_kernel(Matrices* m) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const float* row = m->a[g + i % 2 * 8];
    if constexpr (std::is_same<T, float>::value) {
      a[i] = __builtin_bit_cast(uint32_t, row[q + i / 2 * 4]) | 0x1fff;  // bits that do not count
    } else {
      a[i] = pack<T>(row[2 * q + i / 2 * 8], row[2 * q + i / 2 * 8 + 1]);
    }
  }
  for (int i = 0; i < 2; i++) {
    if constexpr (std::is_same<T, float>::value) {
      b[i] = to_tf32(m->b[q + i * 4][g] * (1 + 0x1p-13f));
    } else {
      b[i] = pack<T>(m->b[2 * q + i * 8][g], m->b[2 * q + i * 8 + 1][g]);
    }
  }
  float sum[4] = {m->first, m->first, m->first, m->first};
  for (int i = 0; i <= warp; i++) mma(sum, a[0], a[1], a[2], a[3], b[0], b[1], T());
  for (int i = 0; i < 4; i++) m->sums[warp][g + i / 2 * 8][2 * q + i % 2] = sum[i];
}

// Whole numbers times a unit: every sum is exact, and the unit of half is a subnormal number.
template <class T>
void expect_products(int inputs, int largest, float unit) {
  Matrices m;
  m.first = unit;
  for (auto& row : m.a) {
    for (float& x : row) x = (std::rand() % (2 * largest + 1) - largest) * unit;
  }
  for (auto& row : m.b) {
    for (float& x : row) x = std::rand() % (2 * largest + 1) - largest;
  }
  launch(mma_kernel<T>, {1, 64, 0, 1, false, 0, 0}, &m);
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 8; j++) {
      double sum = 0;
      for (int k = 0; k < inputs; k++) sum += double(m.a[i][k]) * m.b[k][j];
      for (int warp = 0; warp < 2; warp++) expect(m.sums[warp][i][j] == float(unit + (warp + 1) * sum), "products");
    }
  }
}

void mma_bfloat16() { expect_products<BFloat16>(16, 127, 0x1p-8f); }
void mma_half() { expect_products<Half>(16, 63, 0x1p-24f); }
void mma_tf32() { expect_products<float>(8, 1023, 1); }

// 1 and three quarters of its last bit are 1, and so are 1 and sixteen quarters, of which each is cut off.
void mma_truncates() {
  Matrices m = {};
  m.first = 1;
  m.a[0][0] = 0x3p-25f;
  for (int k = 0; k < 16; k++) m.a[1][k] = 0x1p-25f, m.b[k][0] = 1;
  launch(mma_kernel<BFloat16>, {1, 64, 0, 1, false, 0, 0}, &m);
  for (int row = 0; row < 2; row++) expect(m.sums[0][row][0] == 1, "truncated sums");
}

struct Doubles {
  double a[8][4], b[4][8], sums[8][8];
};

void mma_double() {
  Doubles m;
  for (auto& row : m.a) {
    for (double& x : row) x = std::rand() + 0x1p-10;
  }
  for (auto& row : m.b) {
    for (double& x : row) x = std::rand() % 64;
  }
  const auto kernel = [](Doubles* m) {
    const int row = threadIdx.x / 4, q = threadIdx.x % 4;
    double sums[2] = {1, 1};
    mma(sums[0], sums[1], m->a[row][q], m->b[q][row]);
    for (int i = 0; i < 2; i++) m->sums[row][2 * q + i] = sums[i];
  };
  launch<Doubles*>(kernel, {1, 32, 0, 1, false, 0, 0}, &m);
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < 8; j++) {
      double sum = 1;
      for (int k = 0; k < 4; k++) sum += m.a[i][k] * m.b[k][j];
      expect(m.sums[i][j] == sum, "products of doubles");
    }
  }
}

// ---- kernels with mistakes

void on_cluster_of_two(void (*kernel)(NoArguments)) { launch(kernel, {2, 64, 1024, 2, false, 0, 0}, NoArguments()); }

void barrier_without_expect() {
  on_cluster_of_two([](NoArguments) {
    auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (threadIdx.x == 0) {
      barrier_init(barrier);
      barrier_init_fence();
    }
    sync_cluster();
    if (threadIdx.x == 0 && cluster_rank() == 0) {
      barrier_expect(barrier, 16);
      for (int rank = 0; rank < 2; rank++) store_async(shared_memory() + 16, make_uint4(1, 2, 3, 4), barrier, rank);
    }
    barrier_wait(barrier, 0);
  });
}

void poll_without_store() {
  on_cluster_of_two([](NoArguments) {
    alignas(16) static uint64_t words[2];
    uint64_t two[2] = {};
    for (Patience patience; two[1] == 0; load_relaxed(words, two)) patience.wait();
  });
}

void sync_without_one() {
  on_cluster_of_two([](NoArguments) {
    if (threadIdx.x == 40 && blockIdx.x == 1) return;
    sync_block();
  });
}

void mma_without_one() {
  on_cluster_of_two([](NoArguments) {
    float sum[4] = {};
    if (blockIdx.x == 0 || threadIdx.x == 40) return;
    mma(sum, 0, 0, 0, 0, 0, 0, float());
  });
}

void store_into_exited() {
  on_cluster_of_two([](NoArguments) {
    auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (threadIdx.x == 0) {
      barrier_init(barrier);
      barrier_init_fence();
    }
    sync_cluster();
    if (cluster_rank() == 1) return;
    for (int i = 0; i < 9; i++) {
      sync_block();
      store_async(shared_memory() + 16, make_uint4(1, 2, 3, 4), barrier, 1);
    }
  });
}

void exception() {
  on_cluster_of_two([](NoArguments) {
    if (threadIdx.x == 63) throw std::runtime_error("thrown by a thread");
    sync_cluster();
  });
}

void beyond_shared_memory() {
  on_cluster_of_two([](NoArguments) { shared_memory()[1024] = 1; });
}

void launches() {
  const int blocks = chip(0).processors, clusters = blocks / 8;
  const Launch refused[] = {{0, 32, 0, 1, false, 0, 0},
                            {5, 32, 0, 2, false, 0, 0},
                            {1, 1025, 0, 1, false, 0, 0},
                            {1, 32, chip(0).shared + 1, 1, false, 0, 0},
                            {32, 32, 0, 32, false, 0, 0},
                            {blocks + 1, 32, 0, 1, true, 0, 0},
                            {8 * (clusters + 1), 32, 0, 8, true, 0, 0}};
  for (const Launch& configuration : refused) {
    bool was_refused = false;
    try {
      launch(+[](NoArguments) {}, configuration, NoArguments());
    } catch (const std::runtime_error&) {
      was_refused = true;
    }
    expect(was_refused, "a launch that has to be refused");
  }
  static int64_t threads;
  threads = 0;
  launch(+[](NoArguments) { threads++; }, {100, 256, 227 << 10, 1, false, 0, 0}, NoArguments());
  const auto kernel = [](NoArguments) {
    sync_cluster();
    threads++;
  };
  launch(+kernel, {12, 1024, 0, 12, true, 0, 0}, NoArguments());
  expect(threads == 100 * 256 + 12 * 1024, "threads");
}

const std::map<std::string, void (*)()> kCases = {
#define CASE(name) {#name, name}
    CASE(grid),
    CASE(cluster),
    CASE(neighbours),
    CASE(mma_bfloat16),
    CASE(mma_half),
    CASE(mma_tf32),
    CASE(mma_double),
    CASE(mma_truncates),
    CASE(barrier_without_expect),
    CASE(poll_without_store),
    CASE(sync_without_one),
    CASE(mma_without_one),
    CASE(store_into_exited),
    CASE(exception),
    CASE(beyond_shared_memory),
    CASE(launches)};

}  // namespace

int main(int, char** arguments) {
  std::string results;
  for (uint64_t seed = 0; seed < 8; seed++) {
    rnnfast_emulation_seed(seed);
    std::string result = "ok";
    try {
      kCases.at(arguments[1])();
    } catch (const std::runtime_error& error) {
      result = error.what();
    }
    if (results.find(result + "\n") == std::string::npos) results += result + "\n";
  }
  std::fputs(results.c_str(), stdout);
}
