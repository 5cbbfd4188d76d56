// The one place that checks shapes and dtypes; the kernels assume.
#include "ops.h"

namespace rnnfast {
namespace {

std::string describe(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

CellKind parse_cell(const std::string& cell) {
  if (cell == "RNN_TANH") return kTanh;
  if (cell == "RNN_RELU") return kRelu;
  if (cell == "LSTM") return kLstm;
  STD_TORCH_CHECK(cell == "GRU", "rnnfast: no cell is called '", cell, "'");
  return kGru;
}

void check_tensor(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype) {
  auto sizes = tensor.sizes();
  Shape actual(sizes.begin(), sizes.end());
  STD_TORCH_CHECK(actual == shape, "rnnfast: ", name, " has shape ", describe(actual), ", expected ", describe(shape));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "rnnfast: ", name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ", torch::headeronly::toString(dtype));
}

Dimensions check_layer(const std::string& cell, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes,
                       const OptionalTensor& lengths, const OptionalTensor& resets, bool bidirectional) {
  Dimensions n;
  n.cell = parse_cell(cell);
  n.dtype = x.scalar_type();
  STD_TORCH_CHECK(n.dtype == ScalarType::Float || n.dtype == ScalarType::Double || n.dtype == ScalarType::BFloat16 ||
                      n.dtype == ScalarType::Half,
                  "rnnfast: no kernel for dtype ", torch::headeronly::toString(n.dtype));
  n.acc_dtype = n.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  n.D = bidirectional ? 2 : 1;
  n.G = n.cell == kLstm ? 4 : n.cell == kGru ? 3 : 1;
  n.saved_gates = n.cell == kLstm || n.cell == kGru ? 4 : 0;
  n.packed = batch_sizes.has_value();

  STD_TORCH_CHECK(x.dim() == (n.packed ? 2 : 3), "rnnfast: x has ", x.dim(), " dimensions, expected ",
                  n.packed ? 2 : 3);
  n.I = x.size(x.dim() - 1);
  if (n.packed) {
    STD_TORCH_CHECK(!lengths && !resets, "rnnfast: batch_sizes go with neither lengths nor resets");
    STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0 && batch_sizes->is_cpu() &&
                        batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->is_contiguous(),
                    "rnnfast: batch_sizes has to be a vector of int64 on the CPU");
    n.T = batch_sizes->size(0);
    n.R = x.size(0);
    const int64_t* sizes = static_cast<const int64_t*>(batch_sizes->data_ptr());
    n.N = sizes[0];
    int64_t rows = 0;
    for (int64_t t = 0; t < n.T; t++) {
      STD_TORCH_CHECK(sizes[t] > 0 && sizes[t] <= sizes[t ? t - 1 : 0],
                      "rnnfast: batch_sizes has to be positive and must not increase");
      rows += sizes[t];
    }
    STD_TORCH_CHECK(rows == n.R, "rnnfast: batch_sizes sum to ", rows, ", but x has ", n.R, " rows");
  } else {
    n.T = x.size(0);
    n.N = x.size(1);
    n.R = n.T * n.N;
    check_tensor("lengths", lengths, {n.N}, ScalarType::Long);
    check_tensor("resets", resets, {n.T, n.N}, ScalarType::Bool);
  }

  const int64_t count = weights.size() / n.D;
  STD_TORCH_CHECK(weights.size() % n.D == 0 && count >= 2 && count <= 5, "rnnfast: got ", weights.size(),
                  " weights, expected 2 to 5 for each of ", n.D, " direction(s)");
  n.has_bias = count >= 4;
  n.has_projection = count % 2;
  STD_TORCH_CHECK(!n.has_projection || n.cell == kLstm, "rnnfast: only an LSTM has a projection");
  STD_TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % n.G == 0, "rnnfast: weight_ih has to be [", n.G,
                  " * hidden_size, input_size]");
  n.H = weights[0].size(0) / n.G;
  n.P = n.has_projection ? weights[count - 1].size(0) : n.H;
  for (int64_t d = 0; d < n.D; d++) {
    const Tensor* w = &weights[d * count];
    check_tensor("weight_ih", *w++, {n.G * n.H, n.I}, n.dtype);
    check_tensor("weight_hh", *w++, {n.G * n.H, n.P}, n.dtype);
    if (n.has_bias) {
      check_tensor("bias_ih", *w++, {n.G * n.H}, n.dtype);
      check_tensor("bias_hh", *w++, {n.G * n.H}, n.dtype);
    }
    if (n.has_projection) check_tensor("weight_hr", *w++, {n.P, n.H}, n.dtype);
  }
  check_tensor("h0", h0, n.state(n.P), n.dtype);
  check_tensor("c0", c0, n.state(n.H), n.dtype);
  STD_TORCH_CHECK(!c0 || n.cell == kLstm, "rnnfast: only an LSTM has a cell state");
  return n;
}

}  // namespace rnnfast
