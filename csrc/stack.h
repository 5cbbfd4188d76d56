// The dispatcher's stack, by which an operator is called: on entry it holds the arguments in the order of the schema,
// on return the results.
//
// A tensor lies there as a handle that belongs to whoever takes it. So an operator takes all its arguments before it
// looks at any of them: an exception then frees them all.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Stack {
 public:
  Stack(StableIValue* values, uint64_t arguments, uint64_t results)
      : values_(values), arguments_(arguments), results_(results) {}
  Stack(const Stack&) = delete;

  // The next argument, by its type.
  Tensor tensor() { return take<Tensor>(); }
  OptionalTensor optional_tensor() { return take<OptionalTensor>(); }
  std::vector<Tensor> tensors() { return take<std::vector<Tensor>>(); }
  std::string text() {  // torch's own conversion to std::string leaks one
    const auto handle = take<StringHandle>();
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
  int64_t number() { return take<int64_t>(); }
  bool flag() { return take<bool>(); }

  // Leaves the results there, once all arguments have been taken. It also checks that the kernel fits its schema, so an
  // operator without results calls it, too.
  template <class... Results>
  void give(const Results&... results) {
    STD_TORCH_CHECK(taken_ == arguments_ && sizeof...(results) == results_, "rnnfast: the schema has ", arguments_,
                    " arguments and ", results_, " results, the kernel ", taken_, " and ", sizeof...(results));
    [[maybe_unused]] StableIValue* to = values_;
    ((*to++ = torch::stable::detail::from(results)), ...);
  }

 private:
  template <class Value>
  Value take() {
    STD_TORCH_CHECK(taken_ < arguments_, "rnnfast: the schema has but ", arguments_, " arguments");
    return torch::stable::detail::to<Value>(values_[taken_++]);
  }

  StableIValue* values_;
  uint64_t arguments_, results_, taken_ = 0;
};

}  // namespace rnnfast
