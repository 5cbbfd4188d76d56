// Finds out what the processor can do, and chooses the kernels.
#include "instruction_sets.h"

#include <atomic>
#include <vector>

#include "../ops.h"

// With RNNFAST_PORTABLE the library has no other instruction set.
#if defined(__x86_64__) && !defined(RNNFAST_PORTABLE)
#define RNNFAST_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rnnfast {
namespace {

struct InstructionSet {
  const Kernels* kernels;
  const FlexKernels* flex;
  bool supported;
};

#if defined(RNNFAST_X86)

bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned registers[4];
  return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
         registers[reg] >> bit & 1;
}

// Tile registers are there, and the kernel lets this process use them once it is asked to.
bool have_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr int kEdx = 3, kBf16 = 22, kTile = 24;
  return cpuid_bit(7, 0, kEdx, kTile) && cpuid_bit(7, 0, kEdx, kBf16) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> sets = {{&portable::kernels, &portable::flex, true}};
#if defined(RNNFAST_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && cpuid_bit(7, 1, 0, 5);
    sets.push_back({&avx2::kernels, &avx2::flex, avx2});
    sets.push_back({&avx512::kernels, &avx512::flex, avx512});
    sets.push_back({&avx512_bf16::kernels, &avx512_bf16::flex, avx512_bf16});
    sets.push_back({&amx::kernels, &amx::flex, avx512_bf16 && have_tiles()});
#endif
    return sets;
  }();
  return sets;
}

std::atomic<int64_t>& chosen() {
  static std::atomic<int64_t> number = [] {
    int64_t best = instruction_sets().size() - 1;
    while (!instruction_sets()[best].supported) best--;
    return best;
  }();
  return number;
}

}  // namespace

const Kernels& chosen_kernels() { return *instruction_sets()[chosen()].kernels; }
const FlexKernels& chosen_flex() { return *instruction_sets()[chosen()].flex; }

int64_t instruction_set(std::optional<int64_t> use) {
  if (use) {
    const auto& sets = instruction_sets();
    RNNFAST_CHECK(*use >= 0 && *use < int64_t(sets.size()) && sets[*use].supported,
                  "this CPU or build lacks instruction set ", *use);
    chosen() = *use;
  }
  return chosen();
}

}  // namespace rnnfast
