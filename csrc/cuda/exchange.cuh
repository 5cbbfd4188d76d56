// How the blocks that share a recurrence give each other their part of the state: three ways, one interface.
//
// A group of blocks computes the same batch rows, each block its own hidden units. Every block holds the whole vectors
// (of h; in the backward, of the gradients at W_hh h) of the present step in shared memory, and writes its own units of
// the next one beside it. send() gives those to the other blocks, once all threads of the block have written them, and
// wait() returns when all parts of a step's vectors have come.
//
// Two sets of vectors in turns are enough: a block sends step s + 2 only when it has all of s + 1, which each block
// sends only when it no longer reads s.
#pragma once

#include "products.cuh"

namespace rnnfast {

constexpr int kSets = 2;

// How a layer is cut into groups and blocks, and what lies where in a block's shared memory.
struct Geometry {
  int direction_groups;  // groups of rows in one direction
  int size;              // blocks of a group
  int members;           // of these, the blocks that have units
  int tiles;             // of 16 units, of a block
  int row_blocks;        // of 8 rows, of a group
  int gate_bytes;        // of a row's vector: all units of one gate, whole pairs
  int gates;             // of a vector: 1, or of gradients all
  int parts;             // of a step's vectors: one for each row block and gate
  int vector_bytes;      // of 8 rows
  int set_bytes;         // of all row blocks
  bool flagged;          // of Grid: data is published with flags
  int pairs;             // a warp's share of the vector
  int threads;
  size_t vectors, partials, lengths, matrix, shared;  // offsets; the last one is the size
  size_t matrix_of_warp;
};

// What an exchange knows of its block.
struct Member {
  int thread;          // of the block
  int rank;            // among the group's blocks
  int unit_bytes;      // of a row: a block's units of one gate
  int last;            // the last step that is sent
  char* vectors;       // [kSets][row_blocks][vector_bytes]
  uint64_t* barriers;  // [kSets]
  uint64_t* words;     // [kSets][row_blocks][vector_bytes / 4], the group's, in global memory

  RNNFAST_DEVICE char* at(const Geometry& g, int step) const { return vectors + step % kSets * g.set_bytes; }
  // Calls use(offset) for pieces of so many bytes of the block's units in a step's vectors: every stride-th of each
  // part, from the first on.
  template <int kBytes, class Use>
  RNNFAST_DEVICE void each_piece(const Geometry& g, int first, int stride, const Use& use) const {
    int part_at = 0;
#pragma unroll 1
    for (int part = 0; part < g.parts; part++, part_at += g.gate_bytes * kRows) {
#pragma unroll 1
      for (int i = first; i < kRows * unit_bytes / kBytes; i += stride) {
        use(part_at + place(i % kRows, rank * unit_bytes + i / kRows * kBytes));
      }
    }
  }
};

// One block has all units, and kWarps warps share a tile.
template <int kWarps>
struct Local {
  static constexpr int kSplit = kWarps;

  static RNNFAST_DEVICE int rank(const Geometry&) { return 0; }
  static RNNFAST_DEVICE void begin(const Geometry&, const Member&) {}
  static RNNFAST_DEVICE void wait(const Geometry&, const Member&, int) {}
  static RNNFAST_DEVICE void send(const Geometry&, const Member&, int) {}
  static RNNFAST_DEVICE void end() {}
};

// The blocks of a thread-block cluster, over distributed shared memory. Each set of vectors has a barrier, whose phase
// ends when all bytes of the other blocks have come.
struct Cluster {
  static constexpr int kSplit = 4;

  static RNNFAST_DEVICE int rank(const Geometry&) { return cluster_rank(); }

  static RNNFAST_DEVICE void begin(const Geometry& g, const Member& m) {
    if (m.thread == 0) {
#pragma unroll
      for (int i = 0; i < kSets; i++) barrier_init(m.barriers + i);
      barrier_init_fence();
#pragma unroll
      for (int step = 1; step <= kSets; step++) expect(g, m, step);
    }
    sync_cluster();
  }

  static RNNFAST_DEVICE void wait(const Geometry& g, const Member& m, int step) {
    // A phase that waits for nobody could end twice before each thread has seen it end once.
    if (step == 0 || g.members == 1) return;
    barrier_wait(m.barriers + step % kSets, (step - 1) / kSets % 2);
    // Before this block sends step + 1, and so before anybody sends step + 2.
    if (m.thread == 0) expect(g, m, step + kSets);
  }

  static RNNFAST_DEVICE void send(const Geometry& g, const Member& m, int step) {
    char* vectors = m.at(g, step);
    uint64_t* barrier = m.barriers + step % kSets;
    const int thread = anew(m.thread);
    m.each_piece<kLaneBytes>(g, thread % kWarp, kWarp, [&](int offset) {
      const uint4 piece = *reinterpret_cast<const uint4*>(vectors + offset);
#pragma unroll 1
      for (int peer = thread / kWarp; peer < g.members; peer += blockDim.x / kWarp) {
        if (peer != m.rank) store_async(vectors + offset, piece, barrier, peer);
      }
    });
  }

  // A block's shared memory lives until nobody writes to it any more.
  static RNNFAST_DEVICE void end() { sync_cluster(); }

 private:
  static RNNFAST_DEVICE void expect(const Geometry& g, const Member& m, int step) {
    const uint32_t bytes = (g.members - 1) * g.parts * kRows * m.unit_bytes;
    if (step <= m.last) barrier_expect(m.barriers + step % kSets, bytes);
  }
};

// Blocks anywhere on the chip, through L2, in one of two ways. Little data is published word by word, each with the
// number of its step (Persistent RNNs, Diamos et al. 2016, synchronise by such polling), and read until that is the one
// waited for: one journey to L2 and back, but twice the bytes, again with each poll. Of much data each block publishes
// all of its own, then a flag with the step's number; others poll the flags, then copy the data once.
struct Grid {
  static constexpr int kSplit = 8;
  static constexpr int kData = 4;  // bytes of a word's data
  static constexpr int kRun = kTile * 2;
  static constexpr int kBatch = 4;  // loads of a thread at once

  static RNNFAST_DEVICE int rank(const Geometry& g) { return blockIdx.x % g.size; }
  static RNNFAST_DEVICE void begin(const Geometry&, const Member&) {}
  static RNNFAST_DEVICE void end() {}

  static RNNFAST_DEVICE void wait(const Geometry& g, const Member& m, int step) {
    if (step == 0) return;
    if (g.flagged) return wait_for_flags(g, m, step);
    uint2* vectors = reinterpret_cast<uint2*>(m.at(g, step));
    const uint64_t* words = published(g, m, step);
    // Of a part: 8 bytes of data for each two words. A run is what a tile's units take of a row in 16 bit: the block's
    // own are there already, and those that fill up the last pair belong to nobody, and stay zero.
    const int count = g.gate_bytes * kRows / (2 * kData), own = m.unit_bytes / kRun, thread = anew(m.thread);
    const auto is_sent = [&](int i) {
      const int run = i * 2 * kData / kPair * (kPairBytes / kRun) + i * 2 * kData % kPairBytes / kRun;
      return i < count && run < g.members * own && unsigned(run - m.rank * own) >= unsigned(own);
    };
#pragma unroll 1
    for (int part = 0; part < g.parts; part++, vectors += count, words += 2 * count) {
#pragma unroll 1
      for (int first = thread; first < count; first += kBatch * blockDim.x) {
        uint64_t two[kBatch][2];  // all on their way before the first is looked at
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const int i = first + j * blockDim.x;
          if (is_sent(i)) load_relaxed(words + 2 * i, two[j]);
        }
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const int i = first + j * blockDim.x;
          if (!is_sent(i)) continue;
          for (Patience patience; two[j][0] >> 32 != uint32_t(step) || two[j][1] >> 32 != uint32_t(step);) {
            patience.wait();
            load_relaxed(words + 2 * i, two[j]);
          }
          vectors[i] = make_uint2(uint32_t(two[j][0]), uint32_t(two[j][1]));
        }
      }
    }
    sync_block();
  }

  static RNNFAST_DEVICE void send(const Geometry& g, const Member& m, int step) {
    const char* vectors = m.at(g, step);
    if (g.flagged) {
      m.each_piece<kLaneBytes>(g, anew(m.thread), blockDim.x, [&](int offset) {
        store_data(reinterpret_cast<uint4*>(data(g, m, step) + offset),
                   *reinterpret_cast<const uint4*>(vectors + offset));
      });
      sync_block();
      if (m.thread == 0) store_release(flags(g, m) + m.rank, step);
      return;
    }
    uint64_t* words = published(g, m, step);
    m.each_piece<kData>(g, anew(m.thread), blockDim.x, [&](int offset) {
      const uint32_t data = *reinterpret_cast<const uint32_t*>(vectors + offset);
      store_relaxed(words + offset / kData, uint64_t(step) << 32 | data);
    });
  }

 private:
  static RNNFAST_DEVICE uint64_t* published(const Geometry& g, const Member& m, int step) {
    return m.words + step % kSets * (g.set_bytes / kData);
  }

  // With flags half of the words' room is for data, as in shared memory, and the flags come after it.
  static RNNFAST_DEVICE char* data(const Geometry& g, const Member& m, int step) {
    return reinterpret_cast<char*>(m.words) + step % kSets * g.set_bytes;
  }
  static RNNFAST_DEVICE uint32_t* flags(const Geometry& g, const Member& m) {
    return reinterpret_cast<uint32_t*>(data(g, m, 0) + kSets * g.set_bytes);
  }

  static RNNFAST_DEVICE void wait_for_flags(const Geometry& g, const Member& m, int step) {
    const int thread = anew(m.thread);
#pragma unroll 1
    for (int i = thread; i < g.members; i += blockDim.x) {
      if (i == m.rank) continue;
      for (Patience patience; load_acquire(flags(g, m) + i) < uint32_t(step);) patience.wait();
    }
    sync_block();
    char* vectors = m.at(g, step);
    const char* from = data(g, m, step);
#pragma unroll 4
    for (int i = thread * kLaneBytes; i < g.set_bytes; i += blockDim.x * kLaneBytes) copy_async(vectors + i, from + i);
    copies_done();
    sync_block();
  }
};

}  // namespace rnnfast
