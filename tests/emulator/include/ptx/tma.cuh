// csrc/ptx/tma.cuh for the emulator.
#pragma once

#include <cuda.h>

#include <cstring>

#include "ptx/mbarrier.cuh"

namespace jax_flash::ptx {

inline constexpr uint64_t kEvictFirst = 0;
inline constexpr uint64_t kEvictLast = 1;

// Moves a box of 64 columns, 128 bytes that are swizzled with their row, and returns its size.
// Elements outside the tensor arrive as zeros, and are not stored.
inline uint32_t move_box(uint32_t shared, const CUtensorMap* map, const int (&first)[5],
                         bool store) {
  if (shared % 1024 != 0) emulator::fail("a swizzled box starts at no multiple of 1024", shared);
  uint32_t row = 0;
  for (uint32_t second = 0; second < map->box[2]; ++second) {
    for (uint32_t inner = 0; inner < map->box[1]; ++inner, ++row) {
      for (uint32_t column = 0; column < map->box[0]; ++column) {
        const int64_t at[5] = {first[0] + int64_t{column}, first[1] + int64_t{inner},
                               first[2] + int64_t{second}, first[3], first[4]};
        bool inside = true;
        uint64_t offset = 0;
        for (int i = 0; i < 5; ++i) {
          inside &= at[i] >= 0 && at[i] < static_cast<int64_t>(map->sizes[i]);
          offset += at[i] * map->strides[i];
        }
        const uint32_t place = row * 128 + column * 2;
        void* const target = emulator::shared_pointer(shared + (place ^ (place >> 3 & 0x70)));
        if (store) {
          if (inside) std::memcpy(map->data + offset, target, 2);
        } else {
          uint16_t element = 0;
          if (inside) std::memcpy(&element, map->data + offset, 2);
          std::memcpy(target, &element, 2);
        }
      }
    }
  }
  return row * 128;
}

inline void tma_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint64_t, int c0,
                        int c1, int c2, int c3, int c4) {
  mbarrier_complete(barrier, move_box(shared, map, {c0, c1, c2, c3, c4}, false));
}
inline void tma_load_5d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                  uint64_t, uint16_t ranks, int c0, int c1, int c2, int c3,
                                  int c4) {
  for (int rank = 0; ranks >> rank != 0; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    const uint32_t target = emulator::cluster_address(shared, rank);
    const uint32_t there = emulator::cluster_address(barrier, rank);
    emulator::copy_some_time([=, map = *map] {
      mbarrier_complete(there, move_box(target, &map, {c0, c1, c2, c3, c4}, false));
    });
  }
}
inline void tma_store_5d(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2, int c3,
                         int c4) {
  move_box(shared, map, {c0, c1, c2, c3, c4}, true);
}
inline void tma_prefetch_map(const CUtensorMap*) {}
inline void tma_prefetch_5d(const CUtensorMap*, int, int, int, int, int) {}
inline void tma_store_commit_group() {}
inline void tma_store_wait_read() {}

inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("a bulk copy is not aligned", bytes);
  }
  std::memcpy(emulator::shared_pointer(shared), global, bytes);
  mbarrier_complete(barrier, bytes);
}

inline void tma_store_wait() {}
inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("a bulk store is not aligned", bytes);
  }
  std::memcpy(global, emulator::shared_pointer(shared), bytes);
}
inline void bulk_add_f32(float* global, uint32_t shared, uint32_t bytes) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("a bulk addition is not aligned", bytes);
  }
  const float* const source = static_cast<const float*>(emulator::shared_pointer(shared));
  for (uint32_t i = 0; i < bytes / 4; ++i) global[i] += source[i];
}

inline void fence_proxy_async_global() {}
inline void fence_proxy_async_shared() {}

}  // namespace jax_flash::ptx
