// The one place that checks shapes and dtypes; the kernels assume. Devices and layouts are the dispatcher's.
#include "ops.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace rnnfast {
namespace {

constexpr int64_t kMostSize = int64_t(1) << 31;  // so that few of them multiplied stay below 2^63

std::string describe(Sizes shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

CellKind parse_cell(const std::string& mode) {
  const auto* found =
      std::find_if(std::begin(kCells), std::end(kCells), [&](const CellFacts& facts) { return mode == facts.mode; });
  RNNFAST_CHECK(found != std::end(kCells), "no cell is called '", mode, "'");
  return CellKind(found - kCells);
}

ScalarType accumulated(ScalarType dtype) {
  RNNFAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                    dtype == ScalarType::Half,
                "no kernel for dtype ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_tensor(const char* name, const Tensor& tensor, Sizes shape, ScalarType dtype) {
  RNNFAST_CHECK(tensor.defined(), name, " is missing");  // a schema without `?` lets None pass
  const auto sizes = tensor.sizes();
  RNNFAST_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name, " has shape ",
                describe(sizes), ", expected ", describe(shape));
  RNNFAST_CHECK(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                ", expected ", torch::headeronly::toString(dtype));
}

Dimensions read_cell(int64_t cell, const Tensor& x, bool bidirectional) {
  RNNFAST_CHECK(cell >= 0 && cell < kCommonKinds, "there is no cell ", cell);
  Dimensions n{};
  n.cell = CellKind(cell);
  RNNFAST_CHECK(x.defined(), "x is missing");
  n.dtype = x.scalar_type();
  n.acc_dtype = accumulated(n.dtype);
  n.D = bidirectional ? 2 : 1;
  const CellFacts& facts = kCells[n.cell];
  n.G = facts.gates, n.saved_gates = facts.saved, n.has_cell = facts.has_cell;
  return n;
}

void check_sizes(const Dimensions& n) {
  RNNFAST_CHECK(std::max({n.T, n.N, n.I}) < kMostSize, "x has 2^31 or more steps, rows or features");
}

void count_weights(Dimensions& n, int64_t weights) {
  const CellFacts& facts = kCells[n.cell];
  n.weights = weights / n.D;
  const int more = n.weights - 2 - (facts.unit_weights > 0);  // both biases, and a projection
  RNNFAST_CHECK(weights == n.D * n.weights && more >= 0 && more <= 3 && (facts.projects || more % 2 == 0), "no ",
                facts.mode, " has ", weights, " weights in ", n.D, " direction(s)");
  const bool given[kWeightNames] = {true, true, more >= 2, more >= 2, more % 2 == 1, facts.unit_weights > 0};
  for (int name = 0, place = 0; name < kWeightNames; name++) n.place[name] = given[name] ? place++ : -1;
}

namespace {

// Finds each weight's place: in the order of WeightName, with a space between two; both biases or none, a projection
// where the cell allows it, and weights of the units' own where it has them.
void read_names(Dimensions& n, const std::string& mode, const std::string& names, int64_t weights) {
  static constexpr const char* kNames[kWeightNames] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_units"};
  const CellFacts& facts = kCells[n.cell];
  const char* rest = names.c_str();
  for (int name = 0; name < kWeightNames; name++) {
    const size_t length = std::strlen(kNames[name]);
    const char* at = rest + (n.weights && *rest == ' ');
    const bool given = std::strncmp(at, kNames[name], length) == 0 && (at[length] == ' ' || at[length] == '\0') &&
                       (at > rest || !n.weights);
    n.place[name] = given ? n.weights++ : -1;
    if (given) rest = at + length;
  }
  RNNFAST_CHECK(rest == names.c_str() + names.size() && n.has(kInputWeight) && n.has(kHiddenWeight) &&
                    n.has(kInputBias) == n.has(kHiddenBias) && (!n.has(kProjection) || facts.projects) &&
                    n.has(kWeightOfUnits) == (facts.unit_weights > 0),
                "no ", mode, " has weights '", names, "'");
  RNNFAST_CHECK(weights == n.D * n.weights, "got ", weights, " weights, expected ", n.weights, " for each of ", n.D,
                " direction(s), ", names);
}

}  // namespace

void check_weights(Dimensions& n, const Tensor* weights) {
  const Tensor& w_ih = *n.weight(weights, 0, kInputWeight);
  const Tensor* w_hr = n.weight(weights, 0, kProjection);
  RNNFAST_CHECK(w_ih.dim() == 2 && w_ih.size(0) % n.G == 0, "weight_ih has to be [", n.G,
                " * hidden_size, input_size]");
  n.H = w_ih.size(0) / n.G;
  RNNFAST_CHECK(!w_hr || w_hr->dim() == 2, "weight_hr has to be [proj_size, hidden_size]");
  n.P = w_hr ? w_hr->size(0) : n.H;
  RNNFAST_CHECK(std::max(n.H, n.P) < kMostSize, "the layer has 2^31 or more units");
  const auto check = [&](WeightName name, const char* called, Sizes shape) {
    for (int64_t d = 0; d < n.D && n.has(name); d++) check_tensor(called, *n.weight(weights, d, name), shape, n.dtype);
  };
  check(kInputWeight, "weight_ih", {n.G * n.H, n.I});
  check(kHiddenWeight, "weight_hh", {n.G * n.H, n.P});
  check(kInputBias, "bias_ih", {n.G * n.H});
  check(kHiddenBias, "bias_hh", {n.G * n.H});
  check(kProjection, "weight_hr", {n.P, n.H});
  check(kWeightOfUnits, "weight_units", {kCells[n.cell].unit_weights * n.H});
}

Dimensions check_layer(const Inputs& inputs) {
  const auto& [mode, x, h0, c0, batch_sizes, lengths, resets, bidirectional, names, weights] = inputs;
  Dimensions n = read_cell(parse_cell(mode), x, bidirectional);
  n.packed = batch_sizes.has_value();
  RNNFAST_CHECK(x.dim() == (n.packed ? 2 : 3), "x has ", x.dim(), " dimensions, expected ", n.packed ? 2 : 3);
  n.I = x.size(x.dim() - 1);
  if (n.packed) {
    RNNFAST_CHECK(!lengths && !resets, "batch_sizes go with neither lengths nor resets");
    RNNFAST_CHECK(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0 && batch_sizes->scalar_type() == ScalarType::Long,
                  "batch_sizes has to be a vector of int64 on the CPU");
    n.T = batch_sizes->size(0);
    n.R = x.size(0);
    const int64_t *sizes = static_cast<const int64_t*>(batch_sizes->data_ptr()), stride = batch_sizes->stride(0);
    n.N = sizes[0];
    RNNFAST_CHECK(n.T <= n.R, "batch_sizes do not sum to the ", n.R, " rows of x");  // each is a row or more
    int64_t left = n.R;  // counted down, since what they sum to may be more than an int64
    for (int64_t t = 0; t < n.T; t++) {
      const int64_t size = sizes[t * stride];
      RNNFAST_CHECK(size > 0 && size <= sizes[(t ? t - 1 : 0) * stride],
                    "batch_sizes has to be positive and must not increase");
      left -= std::min(size, left + 1);
    }
    RNNFAST_CHECK(left == 0, "batch_sizes do not sum to the ", n.R, " rows of x");
  } else {
    n.T = x.size(0);
    n.N = x.size(1);
    n.R = n.T * n.N;
    check_tensor("lengths", lengths, {n.N}, ScalarType::Long);
    check_tensor("resets", resets, {n.T, n.N}, ScalarType::Bool);
  }

  check_sizes(n);
  read_names(n, mode, names, weights.size());
  check_weights(n, weights.data());
  check_tensor("h0", h0, n.state(n.P), n.dtype);
  check_tensor("c0", c0, n.state(n.H), n.dtype);
  RNNFAST_CHECK(!c0 || n.has_cell, "no ", mode, " has a cell state");
  return n;
}

}  // namespace rnnfast
