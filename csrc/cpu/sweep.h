// Sweeps over a sequence: how the work of its steps is dealt to threads. Letters as in ../README.md.
//
// The policy: a group is some batch rows of one direction, and a thread takes a group through the whole sequence with
// no barrier, its states in scratch of its own. Where rows are too few for that, the threads share the hidden units of
// every step instead.
#pragma once

#include "gemm.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kThreadWork = 1 << 18;  // multiply-adds worth a thread
constexpr int64_t kUnpackedRows = 4;      // of a sequence, up to which even weights packed beforehand gain nothing

// Whether to pack weights of so many columns for so many rows alone, which moves every weight once. Weights that are
// read as they lie cost each row its share of adding up the lanes of a vector, which is the less of it the more columns
// are summed there.
constexpr bool pays_to_pack(int64_t rows, int64_t columns) { return rows > max(kUnpackedRows, min(16, columns / 16)); }

constexpr int64_t kChunkBytes = 256 * 1024;  // of projected inputs, to be in cache still when the recurrence reads them
constexpr int64_t kChunkRows = 128;          // at least, so that they share the traffic of W_ih

// Steps whose inputs are projected at a time, of so many rows each.
constexpr int64_t chunk_steps(int64_t T, int64_t rows, int64_t bytes_of_row) {
  return max(1, min(T, max(kChunkBytes / max(1, bytes_of_row), kChunkRows) / max(1, rows)));
}

// What a step costs, counted in multiply-adds of the vector unit. Each weight is multiplied once for every row of the
// batch, and read once: a byte costs as much as a multiply-add if it comes from the L2 cache, three times that if not.
struct Cost {
  double row, bytes;  // of a weight

  template <class Format>
  static constexpr Cost of() {
    return {Format::kCost, double(Format::kParts * sizeof(typename Format::Element))};
  }
  double reading(int64_t weights) const { return weights * bytes > (2 << 20) ? 3 * bytes : bytes; }
  double step(int64_t rows, int64_t weights) const { return (rows * row + reading(weights)) * weights; }
};

// How the work of a sweep over the sequence is dealt to threads.
struct Teams {
  int64_t N;
  int D;
  int64_t groups_per_direction, parts;

  // A thread with rows of its own reads all weights. One with units of its own reads only its share of them, but has to
  // wait for the others in every step: that is done for a clear gain only.
  template <class Sum>
  Teams(const Layer& l, const Panels<Sum>& gates, Cost cost) : N(l.steps.N), D(l.D), parts(1) {
    constexpr int64_t kWait = 1 << 16;
    const int64_t weights = gates.width() * l.P;
    const double work = D * (l.R * cost.row + l.steps.T * cost.reading(weights)) * weights;
    const int64_t threads = min(l.threads, max(1, work / kThreadWork));
    groups_per_direction = max(1, min(threads % D ? threads : threads / D, N));
    const double by_rows = cost.step(ceil_div(N, groups_per_direction), weights);
    const int64_t units = min(threads / D, min(gates.count(), cost.step(N, weights) / kWait));
    const int64_t most = units > 0 ? weights * ceil_div(gates.count(), units) / gates.count() : weights;
    if (N > 0 && units > 1 && (cost.step(N, most) + kWait) * 9 / 8 < by_rows) {
      groups_per_direction = 1, parts = units;
    }
  }
  int64_t groups() const { return D * groups_per_direction; }
  int64_t rows() const { return ceil_div(N, groups_per_direction); }

  // Takes all groups through a sweep, which is a sequence of stages. The sweep calls each(stage), and that calls
  // stage(group, part, parts), for a group's part of so many, the units being shared among the parts. No part begins a
  // stage before all have ended the one before.
  template <class Sweep>
  void run(const Sweep& sweep) const {
    if (parts == 1) {
      parallel(groups(), [&](int64_t g) { sweep([&](const auto& stage) { stage(g, 0, 1); }); });
    } else {
      Crew(groups() * parts).run([&](int64_t begin, int64_t end, const auto& barrier) {
        sweep([&](const auto& stage) {
          for (int64_t task = begin; task < end; task++) stage(task / parts, task % parts, parts);
          barrier();
        });
      });
    }
  }
};

// A group's rows are the ranks first, first + stride, ...: dealt in turn, so that every group gets long and short ones.
struct Group {
  const Steps& steps;
  int d;
  int64_t first, stride, rows;

  Group(const Layer& l, const Teams& teams, int64_t g)
      : steps(l.steps),
        d(g / teams.groups_per_direction),
        first(g % teams.groups_per_direction),
        stride(teams.groups_per_direction),
        rows(alive(teams.N)) {}
  int64_t alive(int64_t ranks) const { return max(0, ceil_div(ranks - first, stride)); }
  int64_t alive_at(int64_t t) const { return alive(steps.active[t]); }
  int64_t rank(int64_t i) const { return first + i * stride; }
  int64_t batch_row(int64_t i) const { return steps.order[rank(i)]; }
  int64_t row(int64_t t, int64_t i) const { return steps.row(t, rank(i)); }
  int64_t time(int64_t s) const { return d ? steps.T - 1 - s : s; }
};

// As memset, which may not be given a null pointer even for no bytes.
inline void clear(void* to, size_t bytes) {
  if (bytes) memset(to, 0, bytes);
}

// Writes the n values of a left row.
template <class Format, class Stored>
void get_row(Stored* to, const typename Format::Element* from, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<typename Format::Sum>) {
    store(to + k, Format::get(from + k, round_up(n, Format::kAlign)), min(kLanes<typename Format::Sum>, n - k));
  }
}

// Calls body(p) for the panels of a step, in every second step from the last one to the first: a step so begins with
// the panels that the step before has left in the cache.
template <class Body>
void to_and_fro(Range panels, int64_t s, const Body& body) {
  for (int64_t p = panels.begin; p < panels.end; p++) body(s % 2 ? panels.begin + panels.end - 1 - p : p);
}

template <class Element>
const Element* row_of(const void* base, int64_t row, int64_t width) {
  return base ? static_cast<const Element*>(base) + row * width : nullptr;
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
