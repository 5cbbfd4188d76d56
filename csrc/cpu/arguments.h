// Between the operators and the kernels: tensors made and read, the time-step table, the weights.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "../ops.h"
#include "kernels.h"

namespace rnnfast {

// ---- tensors

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      return kHalf;
  }
}

// Asks for huge pages, as numpy does: the system hands out fresh small ones, a fault each, in as long as it takes to
// compute a good part of what is then written there.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLeast = 4 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  if (bytes >= kLeast) madvise(reinterpret_cast<void*>(begin), bytes - kPage, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const Shape& shape, const Shape& strides, ScalarType dtype) {
  // By Storage.
  static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  AtenTensorHandle handle;
  const int32_t type = types[storage_of(dtype)];
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor made(handle);
  in_huge_pages(made.data_ptr(), made.numel() * made.element_size());
  return made;
}

inline Tensor empty(const Shape& shape, ScalarType dtype) {
  Shape strides = shape;
  if (strides.size()) strides[strides.size() - 1] = 1;
  for (size_t i = shape.size(); i-- > 1;) {
    RNNFAST_CHECK(!__builtin_mul_overflow(strides[i], std::max<int64_t>(shape[i], 1), &strides[i - 1]),
                  "a result would have 2^63 or more elements");
  }
  return empty(shape, strides, dtype);
}

inline Tensor empty_if(bool wanted, const Shape& shape, ScalarType dtype) {
  return empty(wanted ? shape : Shape{0}, dtype);
}

inline void* data_if(bool wanted, const Tensor& tensor) { return wanted ? tensor.data_ptr() : nullptr; }

// Pointers to contiguous data, copied where a tensor is not; the copies live as long as this.
class Reader {
 public:
  const void* operator()(const Tensor& tensor) {
    check_memory(tensor);
    if (tensor.is_contiguous()) return tensor.data_ptr();
    copies_.push_back(torch::stable::contiguous(tensor));
    return copies_.back().data_ptr();
  }
  const void* operator()(const OptionalTensor& tensor) { return tensor ? (*this)(*tensor) : nullptr; }

  // A storage can be made smaller beneath a tensor.
  static void check_memory(const Tensor& tensor) {
    int64_t bytes, offset;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
    int64_t end = offset + 1;
    for (int64_t d = 0; d < tensor.dim(); d++) end += (tensor.size(d) - 1) * tensor.stride(d);
    RNNFAST_CHECK(!tensor.numel() || end * int64_t(tensor.element_size()) <= bytes,
                  "the memory of a tensor was taken away");
  }

 private:
  std::vector<Tensor> copies_;
};

// ---- plain calls

enum Layout { kTimeFirst, kBatchFirst, kCell, kLayouts };

// What a plain call is of, in one number, since an operator takes a quarter of a microsecond for each.
struct Form {
  explicit Form(int64_t bits) : layers(bits >> 8), kind(bits >> 3 & 31), layout(bits >> 1 & 3), D(1 + (bits & 1)) {}
  int64_t layers, kind, layout, D;  // the kind: of plain.cpp a CellKind, of flex.cpp which weights there are
};

// ---- the time-step table

// Steps (see kernels.h) of any sequence form, with the memory that they point to.
class StepTable {
 public:
  StepTable(const Dimensions& n, const int64_t* batch_sizes, const int64_t* lengths, const uint8_t* resets)
      : numbers_(3 * n.T + 2 + 2 * n.N) {
    int64_t *offset = numbers_.data(), *active = offset + n.T, *start = active + n.T + 1;
    int64_t *order = start + n.T + 1, *length = order + n.N;
    std::iota(order, order + n.N, 0);
    if (lengths) {
      std::stable_sort(order, order + n.N, [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    }
    for (int64_t j = 0; j < n.N; j++) {
      length[j] = lengths ? lengths[order[j]] : n.T;
      RNNFAST_CHECK(length[j] >= 0 && length[j] <= n.T, "lengths have to be between 0 and ", n.T);
    }
    start[0] = 0;
    for (int64_t t = 0, rank = n.N; t < n.T; t++) {
      while (rank > 0 && length[rank - 1] <= t) rank--;
      active[t] = batch_sizes ? batch_sizes[t] : rank;
      offset[t] = batch_sizes ? start[t] : t * n.N;
      start[t + 1] = start[t] + active[t];
    }
    active[n.T] = 0;
    for (int64_t t = n.T; batch_sizes && t > 0; t--) {
      for (int64_t j = active[t]; j < active[t - 1]; j++) length[j] = t;
    }
    steps = {n.T, n.N, offset, active, start, order, length, resets};
  }

  Steps steps;

 private:
  std::vector<int64_t> numbers_;
};

// Those of direction d, from the weights of all directions, or from what there is of each.
template <class Pointer, class OfWeight, class Read>
Parameters<Pointer> parameters(const Dimensions& n, const OfWeight* all, int64_t d, const Read& read) {
  const auto pointer = [&](WeightName name) -> Pointer {
    const OfWeight* weight = n.weight(all, d, name);
    return weight ? read(*weight) : nullptr;
  };
  return {pointer(kInputWeight), pointer(kHiddenWeight), pointer(kInputBias),
          pointer(kHiddenBias),  pointer(kProjection),   pointer(kWeightOfUnits)};
}

// What forward and backward have in common; weights: of all directions.
inline void fill(Layer& layer, const Dimensions& n, const StepTable& table, Reader& read, const Tensor* weights) {
  layer.steps = table.steps;
  layer.I = n.I, layer.H = n.H, layer.P = n.P, layer.R = n.R, layer.D = n.D, layer.projected = n.has(kProjection);
  layer.threads = torch::stable::get_num_threads();
  for (int64_t d = 0; d < n.D; d++) layer.weights[d] = parameters<const void*>(n, weights, d, std::ref(read));
}

}  // namespace rnnfast
