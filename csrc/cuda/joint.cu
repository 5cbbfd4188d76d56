// The kernels of steps in one launch of one cell: compiled once for each, with RNNFAST_CELL and RNNFAST_TABLE, the name
// of their table.
#include "block.cuh"
#include "element.cuh"
#include "kernels.h"

namespace rnnfast {
namespace {

// What a block computes: M tiles of 16 units' rows of the matrix times the vectors of kBlocks row blocks.
template <class Math, int M, int kBlocks>
class JointBlock {
  using Sum = typename Math::Sum;
  static constexpr int kTogether = kBlocks < 2 ? 1 : 2, kElements = kTile * kRows;

 public:
  static constexpr int kMine = kBlocks / kTogether;  // elements of a thread

  RNNFAST_DEVICE explicit JointBlock(const JointProduct& p)
      : p_(p),
        thread_(thread_of_block()),
        tile_(int(blockIdx.x) % int(p.tiles)),
        group_(int(blockIdx.x) / int(p.tiles) % int(p.groups)),
        direction_(int(blockIdx.x) / int(p.tiles) / int(p.groups)) {}

  // The thread's r-th element: half of them have none in blocks of 8 rows.
  RNNFAST_DEVICE Element element(const StepArguments& p, int r) const {
    const int64_t n = (group_ * kBlocks + row_block(r)) * kRows + lane() % 4 * 2 + sum_of_lane() % 2;
    const bool owns = row_block(r) < kBlocks;
    return {p, p.H, tile_ * kTile + lane() / 4 * 2 + sum_of_lane() / 2, owns ? n : p.sequence.N, direction_};
  }

  // Calls use(r, sums) with the M sums of each element of the thread.
  template <class Use>
  RNNFAST_DEVICE void product(const Use& use) const {
    Sum sums[kBlocks][M][4] = {};
    const uint4* matrix = static_cast<const uint4*>(p_.matrix) + (direction_ * p_.tiles + tile_) * p_.pairs * kOfPair;
    const uint4* vectors = static_cast<const uint4*>(p_.vectors) +
                           (direction_ * p_.groups + group_) * kBlocks * p_.pairs * (kPair / kLaneBytes);
    const int lane = thread_ % kWarp;
#pragma unroll kUnrolled
    for (int pair = thread_ / kWarp; pair < p_.pairs; pair += kJointWarps) {
      Fragment a[M];
      uint4 b[kBlocks];
#pragma unroll
      for (int m = 0; m < M; m++) {
        const uint4* from = matrix + pair * kOfPair + m * 2 * kWarp + lane;
        a[m] = {from[0], from[kWarp]};
      }
#pragma unroll
      for (int block = 0; block < kBlocks; block++) {
        b[block] = vectors[(block * p_.pairs + pair) * (kPair / kLaneBytes) + lane];
      }
      // Tensor cores cut off the sums that they add to, so what they add up is short.
#pragma unroll
      for (int block = 0; block < kBlocks; block++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
          Sum part[4] = {};
          Math::multiply(part, a[m], b[block]);
#pragma unroll
          for (int i = 0; i < 4; i++) sums[block][m][i] += part[i];
        }
      }
    }

    Sum* shared = reinterpret_cast<Sum*>(shared_memory());
    const auto at = [&](int warp, int block, int m) { return ((warp * kTogether + block) * M + m) * 4 * kWarp; };
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (r) sync_block();
#pragma unroll
      for (int block = 0; block < kTogether; block++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            shared[at(thread_ / kWarp, block, m) + i * kWarp + lane] = sums[r * kTogether + block][m][i];
          }
        }
      }
      sync_block();
      if (thread_ >= kTogether * kElements) continue;
      Sum sum[M] = {};
#pragma unroll
      for (int warp = 0; warp < kJointWarps; warp++) {
#pragma unroll
        for (int m = 0; m < M; m++) sum[m] += shared[at(warp, thread_ / kElements, m) + thread_ % kElements];
      }
      use(r, sum);
    }
  }

  // Leaves a value of one gate of an element for the product of the next step.
  RNNFAST_DEVICE void leave(const Element& of, int gate, typename Math::Stored value) const {
    const int k = gate * p_.gate_bytes + int(of.unit) * int(sizeof(value));
    const int64_t at = place_of(p_.pairs, p_.groups * kBlocks, of.d, of.n, k);
    *reinterpret_cast<typename Math::Stored*>(static_cast<char*>(p_.next) + at) = Math::operand(Sum(value));
  }

 private:
  static constexpr int kOfPair = M * 2 * kWarp;                  // 16 bytes each
  static constexpr int kUnrolled = M * kBlocks < 4 ? 4 / M : 1;  // so many bytes on their way at once

  // A thread owns the sum that some lane has of a row block, of all warps.
  RNNFAST_DEVICE int lane() const { return thread_ % kWarp; }
  RNNFAST_DEVICE int sum_of_lane() const { return thread_ % kElements / kWarp; }
  RNNFAST_DEVICE int row_block(int r) const { return r * kTogether + thread_ / kElements; }

  const JointProduct& p_;
  int thread_;
  int64_t tile_, group_, direction_;
};

template <class Cell, class Math, int kBlocks>
__global__ void __launch_bounds__(kJointThreads, 1) joint_forward(const __grid_constant__ JointForward p) {
  using Block = JointBlock<Math, Cell::kGates, kBlocks>;
  const Block block(p.product);
  ForwardElement<Cell, typename Math::Stored> own[Block::kMine];
#pragma unroll
  for (int r = 0; r < Block::kMine; r++) own[r].load(p, block.element(p, r));
  block.product([&](int r, const auto& sums) {
    if (!own[r].at.valid) return;  // both turns have the initial state, which rows keep that begin later
    block.leave(own[r].at, 0, own[r].finish(p, [&](int gate) { return sums[gate]; }));
  });
}

template <class Cell, class Math, int kBlocks>
__global__ void __launch_bounds__(kJointThreads, 1) joint_backward(const __grid_constant__ JointBackward p) {
  using Stored = typename Math::Stored;
  using Block = JointBlock<Math, 1, kBlocks>;
  const Block block(p.product);
  BackwardElement<Cell, Stored> own[Block::kMine];
#pragma unroll
  for (int r = 0; r < Block::kMine; r++) own[r].load(p, block.element(p, r));
  block.product([&](int r, const auto& sums) {
    if (!own[r].at.exists) return;
    own[r].finish(p, sums[0], [&](int gate, Stored d) { block.leave(own[r].at, gate, d); });
  });
}

template <class Math>
constexpr JointKernels kernels_of() {
  using Cell = RNNFAST_CELL;
  constexpr int kMany = joint_row_blocks(1, sizeof(typename Math::Sum));
  return {{joint_forward<Cell, Math, 1>, joint_forward<Cell, Math, kMany>},
          {joint_backward<Cell, Math, 1>, joint_backward<Cell, Math, kMany>}};
}

}  // namespace

#define RNNFAST_JOINT_OF(...) kernels_of<__VA_ARGS__>(),
const JointKernels RNNFAST_TABLE[] = {RNNFAST_MATHS(RNNFAST_JOINT_OF)};

}  // namespace rnnfast
