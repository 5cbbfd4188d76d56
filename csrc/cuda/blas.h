// cuBLAS as torch has loaded it, called directly: torch's own products take the precision of float32 from a switch of
// the process, not of the call, and cost the host twice the time. Nothing is linked: a process without cuBLAS, or with
// one of a name not known here, goes on with torch's.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace rnnfast {

// A row-major operand: element (i, j) lies at i * row + j * column, and one of the two strides is 1.
struct Operand {
  void* data;
  int64_t row, column;

  bool is_transposed() const { return column != 1; }
  int64_t stride() const { return is_transposed() ? column : row; }
};

// Of a matrix [m, n] whose elements lie together along its rows or its columns, or nothing. Of a single row or column
// the other stride is free, and may be less than the length.
inline std::optional<Operand> operand_of(void* data, int64_t m, int64_t n, int64_t row, int64_t column) {
  if ((column == 1 || n == 1) && (row >= n || m == 1)) return Operand{data, row > n ? row : n, 1};
  if ((row == 1 || m == 1) && (column >= m || n == 1)) return Operand{data, 1, column > m ? column : m};
  return {};
}

enum class BlasType { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat16 = 14 };  // as cudaDataType_t numbers them

class Blas {
 public:
  static constexpr int64_t kWorkspace = 32 << 20;  // bytes, as NVIDIA recommends for Hopper

  // Of the process; null if it has none.
  static Blas* find() {
    static Blas blas;
    return blas.multiply_ ? &blas : nullptr;
  }

  // A handle for the current device, bound to a stream. It is used by one thread at a time; one that comes back serves
  // the next call on its device.
  class Handle {
   public:
    Handle(Blas& blas, int device, int64_t stream, void* workspace) : blas_(blas), device_(device) {
      {
        std::lock_guard<std::mutex> lock(blas.mutex_);
        auto& free = blas.free_[device];
        if (!free.empty()) {
          value_ = free.back();
          free.pop_back();
        }
      }
      if (!value_ && blas.create_(&value_)) value_ = nullptr;
      bound_ = value_ && !blas.set_stream_(value_, reinterpret_cast<void*>(stream)) &&
               !blas.set_workspace_(value_, workspace, kWorkspace);
    }
    Handle(const Handle&) = delete;
    ~Handle() {
      if (!value_) return;
      std::lock_guard<std::mutex> lock(blas_.mutex_);
      blas_.free_[device_].push_back(value_);
    }

    // out[m, n] = a[m, k] b[k, n], or added to it; whether it was done.
    bool multiply(const Operand& out, const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k,
                  BlasType type, bool accumulate, bool tf32) const {
      if (!bound_) return false;
      const float one = 1, beta = accumulate;
      const double one_64 = 1, beta_64 = accumulate;
      const bool is_double = type == BlasType::kDouble;
      int compute = tf32 && type == BlasType::kFloat ? kComputeTf32 : kCompute32;
      if (is_double) compute = kCompute64;
      // To cuBLAS, whose matrices are column-major, each operand is its transpose, and so is the result.
      return !blas_.multiply_(value_, b.is_transposed(), a.is_transposed(), n, m, k,
                              is_double ? static_cast<const void*>(&one_64) : &one, b.data, int(type), b.stride(),
                              a.data, int(type), a.stride(), is_double ? static_cast<const void*>(&beta_64) : &beta,
                              out.data, int(type), out.stride(), compute, kDefaultAlgorithm);
    }

   private:
    Blas& blas_;
    int device_;
    void* value_ = nullptr;
    bool bound_;
  };

 private:
  // As cublas_api.h numbers them, in every version.
  static constexpr int kCompute32 = 68, kComputeTf32 = 77, kCompute64 = 70, kDefaultAlgorithm = -1;

  Blas() {
    void* library = nullptr;
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
      if (!library) library = dlopen(name, RTLD_NOLOAD | RTLD_NOW);
    }
    if (!library) return;
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    if (!(find("cublasCreate_v2", create_) && find("cublasSetStream_v2", set_stream_) &&
          find("cublasSetWorkspace_v2", set_workspace_) && find("cublasGemmEx", multiply_))) {
      multiply_ = nullptr;
    }
  }

  int (*create_)(void**) = nullptr;
  int (*set_stream_)(void*, void*) = nullptr;
  int (*set_workspace_)(void*, void*, size_t) = nullptr;
  int (*multiply_)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                   const void*, void*, int, int, int, int) = nullptr;
  std::mutex mutex_;
  std::map<int, std::vector<void*>> free_;
};

}  // namespace rnnfast
