// Which regime serves a layer, and how it is cut: one table, the reason beside each number.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace rnnfast {

struct Layer {
  CellKind cell;
  Arithmetic arithmetic;
  int64_t N, H, D;
  int device;

  int value_bytes() const { return arithmetic <= kOfHalf ? 2 : arithmetic == kOfDouble ? 8 : 4; }
};

struct Plan {
  Regime regime = kStepwise;
  const void* kernel = nullptr;
  Geometry geometry{};
  JointProduct product{};
  Launch launch{};
  int64_t groups = 0, groups_at_once = 0;  // a launch has so many at most
  std::string reason;

  // For the choice. Cycles of a step: of a block alone on its multiprocessor, and what several have to share.
  double fixed = 0, shared_work = 0, cycles = 0;
  int64_t resident = 0;  // groups that the device holds at once
  bool resident_is_known = false;

  void estimate(const Chip& chip) {
    groups_at_once = regime == kChip ? std::min(groups, resident) : groups;
    const int64_t at_once = std::min(groups, resident), waves = (groups + resident - 1) / resident;
    const double of_one = double(at_once) * geometry.size / chip.processors;
    cycles = waves * (fixed + shared_work * std::max(1.0, of_one));
  }
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Cycles of a step, by which cuts are compared: a fit by bench/cuda_costs.py to what 1,600 of them took on an H200, of
// which it chooses one that takes 3 % longer than the best, in the mean.
struct Costs {
  // Of 8 rows, whatever the size: barriers, and the latencies of product, cell and exchange.
  static constexpr double kMultiprocessor = 2080, kSplitMultiprocessor = 1570, kCluster = 1820, kChip = 2920;
  static constexpr double kFlags = 3660, kBackward = 1060;
  static constexpr double kProduct = 4.8, kExactProduct = 38;  // an mma.sync of each warp of a scheduler
  static constexpr double kRead = 1.8 / 128;                   // a byte of shared memory
  static constexpr double kElement = 94;                       // in the forward: an element that each thread computes
  static constexpr double kHandOver = 16;                      // handing a warp's sums of a row block to other warps
  // Each row block beyond the first, and each byte that a block receives.
  static constexpr double kClusterRows = 830, kClusterBytes = 0.052, kChipRows = 1470, kChipBytes = 0.10;
  static constexpr double kFlaggedRows = 780, kFlaggedBytes = 0.027;
  // A step by products of the whole device: what a launch takes the host, half of what two of them took there, and
  // cuBLAS's multiply-adds a cycle.
  static constexpr double kLaunch = 10000, kHalfRate = 75000, kTf32Rate = 37000, kExactRate = 10000;
  // Not measured here: bytes that all multiprocessors together read from L2 in a cycle, by what others measured of an
  // H100 (5.5 TB/s), and two m8n8k4 of float64 by its peak.
  static constexpr double kFromL2 = 2800, kDoubleProduct = 14;
};

// Sums of an element that are handed over, as Block has them.
constexpr int sums_together(int tiles) { return tiles > 2 ? 4 : tiles; }

// What the choice has to know of a cut.
template <class Arguments>
void weigh(Plan& plan, const Persistent<Arguments>& k, const Layer& layer, const Chip& chip) {
  const Geometry& g = plan.geometry;
  const int warps = g.threads / kWarp;

  // What a step of a block takes beside the work in which blocks on one multiprocessor get in each other's way.
  const double schedulers = g.threads / (4.0 * kWarp);
  if (k.regime == kCluster) {
    plan.fixed = Costs::kCluster;
  } else if (k.regime == kChip) {
    plan.fixed = g.flagged ? Costs::kFlags : Costs::kChip;
  } else {
    plan.fixed = k.split > 1 ? Costs::kSplitMultiprocessor : Costs::kMultiprocessor;
  }
  const bool backward = std::is_same<Arguments, BackwardArguments>::value;
  if (backward) plan.fixed += Costs::kBackward;
  const double received = double(g.set_bytes) * (g.members - 1) / g.members, further = g.row_blocks - 1;
  if (k.regime == kCluster) {
    plan.fixed += Costs::kClusterBytes * received + Costs::kClusterRows * further * (backward ? 2.5 : 1);
  } else if (k.regime == kChip) {
    if (g.flagged) {
      plan.fixed += Costs::kFlaggedBytes * received + Costs::kFlaggedRows * further;
    } else {
      plan.fixed += Costs::kChipBytes * received + Costs::kChipRows * further;
    }
  }
  plan.shared_work = double(g.pairs) * 2 * k.tiles * g.row_blocks * schedulers *
                     (layer.arithmetic == kOfExact ? Costs::kExactProduct : Costs::kProduct);
  plan.shared_work += g.row_blocks * warps * (double(g.pairs) * kPair + double(g.matrix_of_warp)) * Costs::kRead;
  if (!backward) {
    plan.shared_work += Costs::kElement * schedulers * (k.split == 1 ? 4 : std::max(1.0, 4.0 * g.row_blocks / k.split));
  }
  if (k.shares > 1) plan.shared_work += Costs::kHandOver * g.row_blocks * schedulers * sums_together(k.tiles);

  // Without the driver, which would load each kernel that it is asked about: full registers, and of the clusters what
  // fits into the groups of multiprocessors that a chip is made of.
  const int registers = k.threads == 512 ? 128 : 256;
  const int64_t of_one = std::min<int64_t>(65536 / (registers * g.threads), chip.shared / (g.shared + 1024));
  double usable = 1;
  if (k.regime == kCluster && g.size > 2) {
    usable = 0.73;
    if (g.size == 4) usable = 0.9;
    if (g.size == 8) usable = 0.85;
  }
  plan.resident = std::max<int64_t>(1, int64_t(chip.processors * usable) * std::max<int64_t>(of_one, 1) / g.size);
  plan.estimate(chip);
}

// The cut with so many blocks a group, so many tiles a block and so many row blocks; or none, if a block can't be so.
template <class Arguments>
std::optional<Plan> cut(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, int size, int tiles,
                        int blocking, bool flagged = false) {
  const int warps = tiles * k.split, row_blocks = 1 << blocking;
  if (warps * kWarp > k.threads || !k.kernels[blocking]) return {};
  Plan plan;
  plan.regime = k.regime;
  Geometry& g = plan.geometry;
  g.size = size, g.tiles = tiles, g.row_blocks = row_blocks;
  g.members = divide_up(divide_up(layer.H, kTile), tiles);
  g.direction_groups = divide_up(layer.N, int64_t(row_blocks) * kRows);
  g.gates = k.gates, g.parts = k.gates * row_blocks;
  g.gate_bytes = round_up(int64_t(g.members) * tiles * kTile * layer.value_bytes(), kPairBytes);
  g.vector_bytes = g.gates * g.gate_bytes * kRows;
  g.set_bytes = row_blocks * g.vector_bytes, g.flagged = flagged;
  g.pairs = divide_up(int64_t(g.gates) * g.gate_bytes / kPairBytes, k.shares);
  g.threads = warps * kWarp;
  g.matrix_of_warp = size_t(std::max(g.pairs - k.kept[blocking], 0)) * k.tiles * kTileBytes;

  size_t end = 0;
  auto take = [&](size_t bytes) {
    const size_t at = end;
    end = round_up(end + bytes, 128);
    return at;
  };
  take(sizeof(uint64_t) * kSets);  // barriers
  g.vectors = take(size_t(kSets) * g.set_bytes);
  g.partials = take(k.shares > 1 ? sizeof(float) * warps * row_blocks * 4 * sums_together(k.tiles) * kWarp : 0);
  g.lengths = take(sizeof(int) * row_blocks * kRows);
  g.matrix = take(warps * g.matrix_of_warp);
  g.shared = end;
  if (g.shared > chip.shared) return {};

  plan.kernel = reinterpret_cast<const void*>(k.kernels[blocking]);
  plan.groups = layer.D * g.direction_groups;
  plan.launch = {plan.groups * size, g.threads,    g.shared, k.regime == kCluster ? size : 1,
                 k.regime == kChip,  layer.device, 0};

  weigh(plan, k, layer, chip);
  return plan;
}

inline void explain(Plan& plan) {
  const Geometry& g = plan.geometry;
  const char* kWhere[] = {"", "multiprocessor", "cluster", "chip"};
  const auto number = [](int64_t n) { return std::to_string(n); };
  const std::string where = g.members == 1 ? "one multiprocessor" : number(g.members) + " multiprocessors";
  plan.reason = std::string(kWhere[plan.regime]) + ": W_hh stays on " + where + ", " + number(g.row_blocks * kRows) +
                " rows on each, with " + number(g.threads) + " threads and " + number(divide_up(g.shared, 1024)) +
                " KB" + (g.flagged ? ", by flags" : "");
}

// Of a plan that takes a launch a step or two, and why there is no other.
inline void explain_steps(Plan& plan, const std::string& why) {
  if (plan.regime == kStepwise) {
    plan.reason = "stepwise: " + why + "; a product and another launch a step";
  } else {
    plan.reason = "joint: " + why + "; one launch a step, " + std::to_string(plan.geometry.row_blocks * kRows) +
                  " rows in each block";
  }
}

// All cuts of a layer under a regime. Forced to it, as in tests of small layers: into as many blocks as can be.
template <class Arguments, class Use>
void each_cut(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, bool forced, const Use& use) {
  const int tiles = divide_up(layer.H, kTile);
  for (int blocking = 0; blocking < kBlockings; blocking++) {
    if (k.regime == kMultiprocessor) {
      use(cut(k, layer, chip, 1, tiles, blocking));
    } else if (k.regime == kCluster) {
      for (int size = 2; chip.major >= 9 && size <= 16; size *= 2) {
        const int a_block = divide_up(tiles, size);
        if (!forced || size == 16 || a_block == 1) use(cut(k, layer, chip, size, a_block, blocking));
      }
    } else {
      for (int a_block = 1; a_block * k.split * kWarp <= k.threads; a_block++) {
        for (bool flagged : {false, true}) {
          use(cut(k, layer, chip, divide_up(tiles, a_block), a_block, blocking, flagged));
        }
      }
    }
  }
}

// A step as cuBLAS's product and a launch.
inline Plan stepwise(const Layer& layer) {
  Plan plan;
  double rate = layer.value_bytes() == 2 ? Costs::kHalfRate : Costs::kExactRate;
  if (layer.arithmetic == kOfTf32) rate = Costs::kTf32Rate;
  const double of_w = double(kCells[layer.cell].gates) * layer.D * layer.H * layer.H;
  plan.cycles = 2 * Costs::kLaunch + std::max(of_w * layer.N / rate, of_w * layer.value_bytes() / Costs::kFromL2);
  plan.resident_is_known = true;
  return plan;
}

// A step in one launch, with blocks of few rows or of many.
template <class Arguments>
Plan joint(void (*kernel)(Arguments), int blocking, const Layer& layer, const Chip& chip) {
  const bool backward = std::is_same<Arguments, JointBackward>::value, is_double = layer.arithmetic == kOfDouble;
  const int gates = kCells[layer.cell].gates, M = backward ? 1 : gates, sum_bytes = is_double ? 8 : 4;
  const int row_blocks = joint_row_blocks(blocking, sum_bytes), rows = row_blocks * kRows;
  Plan plan;
  plan.regime = kJoint, plan.kernel = reinterpret_cast<const void*>(kernel), plan.geometry.row_blocks = row_blocks;
  JointProduct& p = plan.product;
  p.tiles = divide_up(layer.H, kTile), p.groups = divide_up(layer.N, rows);
  p.gate_bytes = round_up(layer.H * layer.value_bytes(), kPairBytes);
  p.pairs = (backward ? gates : 1) * p.gate_bytes / kPairBytes;
  const int64_t blocks = layer.D * p.groups * p.tiles;
  plan.launch = {blocks, kJointThreads, joint_shared(row_blocks, M, sum_bytes), 1, false, layer.device, 0};

  double product = layer.arithmetic == kOfExact ? Costs::kExactProduct : Costs::kProduct;
  if (is_double) product = Costs::kDoubleProduct;
  const double from_l2 = double(blocks) * (M * kTile + rows) * p.pairs * kPairBytes / Costs::kFromL2;
  const double products = divide_up(blocks, chip.processors) * (2.0 * p.pairs * M * row_blocks / 4) * product;
  plan.cycles = Costs::kLaunch + from_l2 + products;  // the few warps of a multiprocessor overlap them little
  return plan;
}

constexpr int kFewestJointSteps = 4;  // with fewer, what a call arranges takes longer than the launches that it spares

// The plan of a layer: the cheapest of all, or of a regime, or the regime's cut of that number. Of float64 there are no
// variants. Steps in one launch were not timed cut by cut, so they are compared with nothing but the other steps.
template <class Arguments, class Joint>
Plan make_plan(const Persistent<Arguments>* variants, const Joint& joint_kernels, const Layer& layer, const Chip& chip,
               Regime forced, std::optional<int> only) {
  std::vector<Plan> plans, of_joint;
  for (int blocking = 0; blocking < kJointBlockings; blocking++) {
    if (!only || *only == blocking) of_joint.push_back(joint(joint_kernels[blocking], blocking, layer, chip));
  }
  const auto cheaper = [](const Plan& a, const Plan& b) { return a.cycles < b.cycles; };
  const auto best_joint = std::min_element(of_joint.begin(), of_joint.end(), cheaper);
  if (forced == kJoint) return of_joint.empty() ? Plan() : *best_joint;
  int number = 0;
  for (int variant = 0; variants && variant < kVariants; variant++) {
    const auto& k = variants[variant];
    if (forced != kByTable && forced != k.regime) continue;
    each_cut(k, layer, chip, forced != kByTable && !only, [&](const std::optional<Plan>& plan) {
      if (plan && (!only || *only == number)) plans.push_back(*plan);
      number++;
    });
  }
  if (forced == kByTable) plans.push_back(stepwise(layer));
  // The driver is asked about the cheapest plan, which may make that dearer, until the cheapest is one that it has been
  // asked about.
  while (!plans.empty()) {
    const auto best = std::min_element(plans.begin(), plans.end(), cheaper);
    if (best->resident_is_known) {
      if (best->regime == kStepwise) return best_joint->cycles < best->cycles ? *best_joint : *best;
      explain(*best);
      return *best;
    }
    best->resident = best->regime == kCluster ? resident_clusters(best->kernel, best->launch)
                                              : resident_blocks(best->kernel, best->launch) / best->geometry.size;
    best->resident_is_known = true;
    if (best->resident == 0) {
      plans.erase(best);
    } else {
      best->estimate(chip);
    }
  }
  return {};
}

}  // namespace rnnfast
