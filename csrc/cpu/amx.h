// The tile unit of x86 (AMX): eight registers of up to 16 rows of 64 bytes. Written in assembly, as the number of a
// register is part of an instruction and the compilers' intrinsics cannot take it from a template.
#pragma once

#include <cstdint>

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

#if defined(RNNFAST_AMX)

// Tiles 0-5, sums and left operands, have the rows that a product asks for; 6 and 7, right operands, all 16.
struct alignas(64) TileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
  void save() { asm volatile("sttilecfg %0" : "=m"(*this)); }
};

// What this thread has set, and what was set before.
thread_local int tile_rows_set = 0;
thread_local TileShapes tiles_before;

inline void set_tile_rows(int rows) {
  if (tile_rows_set == rows) return;
  if (!tile_rows_set) tiles_before.save();
  TileShapes shapes;
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = i < 6 ? rows : 16;
  shapes.load();
  tile_rows_set = rows;
}

// Leaves the thread's tiles as they were shaped: other libraries remember what they have set.
struct TileGuard {
  ~TileGuard() {
    if (!tile_rows_set) return;
    tile_rows_set = 0;
    if (tiles_before.palette) {
      tiles_before.load();
    } else {
      asm volatile("tilerelease");
    }
  }
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
// sum[m][n] += left[m][k] * right[k/2][n][k%2]
template <int kSum, int kLeft, int kRight>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#else

struct TileGuard {
  ~TileGuard() {}  // so that no compiler finds it unused
};

#endif

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
