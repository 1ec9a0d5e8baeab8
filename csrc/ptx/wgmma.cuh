// Warpgroup matrix multiply-accumulate (PTX ISA 9.7.15): 64 x kN x 16, 16-bit operands, f32
// accumulators. The accumulator's element (row, column) for lane l of warp w in the warpgroup:
//   d[4 j + 2 h + e] = (16 w + l / 4 + 8 h, 8 j + 2 (l % 4) + e).
// Two neighbouring j packed to 16 bits are one A fragment of the next product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

// Orders register accesses of the warpgroup before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the newest groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Matrix descriptor (9.7.15.5.1) for 128-byte swizzled tiles: groups of eight 128-byte rows follow
// each other; `leading_bytes` is the step between 64-column slabs where the tile is read
// transposed, and ignored otherwise.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroup = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kRowGroup | uint64_t{leading_bytes >> 4} << 16 | (shared & 0x3ffff) >> 4;
}

// d += A B; d is overwritten where `accumulate` is 0. `ss`: A from shared memory, B K-major, A too
// or, with kTransposed, M-major. `rs`: A from registers, B transposed (N-major).
template <typename T, int kN>
struct Wgmma;

// clang-format off: it never settles on these macros
// Comma-separated lists of 10 k + c operands, numbered from 0.
#define JAX_FLASH_TEN(t)                                                                           \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define JAX_FLASH_LIST_16 JAX_FLASH_TEN() "%10, %11, %12, %13, %14, %15"
#define JAX_FLASH_LIST_32 JAX_FLASH_TEN() JAX_FLASH_TEN(1) JAX_FLASH_TEN(2) "%30, %31"
#define JAX_FLASH_LIST_40 JAX_FLASH_TEN() JAX_FLASH_TEN(1) JAX_FLASH_TEN(2) "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define JAX_FLASH_LIST_48 \
  JAX_FLASH_TEN()         \
  JAX_FLASH_TEN(1) JAX_FLASH_TEN(2) JAX_FLASH_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_FLASH_LIST_56 \
  JAX_FLASH_TEN()         \
  JAX_FLASH_TEN(1) JAX_FLASH_TEN(2) JAX_FLASH_TEN(3) JAX_FLASH_TEN(4) "%50, %51, %52, %53, %54, " \
                                                                      "%55"
#define JAX_FLASH_LIST_64 \
  JAX_FLASH_TEN()         \
  JAX_FLASH_TEN(1)        \
  JAX_FLASH_TEN(2) JAX_FLASH_TEN(3) JAX_FLASH_TEN(4) JAX_FLASH_TEN(5) "%60, %61, %62, %63"
#define JAX_FLASH_LIST_96                                                              \
  JAX_FLASH_TEN()                                                                      \
  JAX_FLASH_TEN(1)                                                                     \
  JAX_FLASH_TEN(2)                                                                     \
  JAX_FLASH_TEN(3) JAX_FLASH_TEN(4) JAX_FLASH_TEN(5) JAX_FLASH_TEN(6) JAX_FLASH_TEN(7) \
      JAX_FLASH_TEN(8) "%90, %91, %92, %93, %94, %95"
#define JAX_FLASH_LIST_128                                                             \
  JAX_FLASH_TEN()                                                                      \
  JAX_FLASH_TEN(1)                                                                     \
  JAX_FLASH_TEN(2)                                                                     \
  JAX_FLASH_TEN(3) JAX_FLASH_TEN(4) JAX_FLASH_TEN(5) JAX_FLASH_TEN(6) JAX_FLASH_TEN(7) \
      JAX_FLASH_TEN(8) JAX_FLASH_TEN(9) JAX_FLASH_TEN(10)                              \
          JAX_FLASH_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define JAX_FLASH_EIGHT(i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_FLASH_REGS_16 JAX_FLASH_EIGHT(0), JAX_FLASH_EIGHT(8)
#define JAX_FLASH_REGS_32 \
  JAX_FLASH_EIGHT(0), JAX_FLASH_EIGHT(8), JAX_FLASH_EIGHT(16), JAX_FLASH_EIGHT(24)
#define JAX_FLASH_REGS_40 JAX_FLASH_REGS_32, JAX_FLASH_EIGHT(32)
#define JAX_FLASH_REGS_48 JAX_FLASH_REGS_32, JAX_FLASH_EIGHT(32), JAX_FLASH_EIGHT(40)
#define JAX_FLASH_REGS_56 JAX_FLASH_REGS_48, JAX_FLASH_EIGHT(48)
#define JAX_FLASH_REGS_64 JAX_FLASH_REGS_56, JAX_FLASH_EIGHT(56)
#define JAX_FLASH_REGS_96                                                           \
  JAX_FLASH_REGS_64, JAX_FLASH_EIGHT(64), JAX_FLASH_EIGHT(72), JAX_FLASH_EIGHT(80), \
      JAX_FLASH_EIGHT(88)
#define JAX_FLASH_REGS_128                                                            \
  JAX_FLASH_REGS_96, JAX_FLASH_EIGHT(96), JAX_FLASH_EIGHT(104), JAX_FLASH_EIGHT(112), \
      JAX_FLASH_EIGHT(120)

// kI0.. are the operand numbers that follow the accumulators (kN / 2 of them).
#define JAX_FLASH_WGMMA(T, kType, kN, kRegs, kI0, kI1, kI2, kI3, kI4, kI5)                       \
  template <>                                                                                    \
  struct Wgmma<T, kN> {                                                                          \
    template <int kTransposed = 0>                                                               \
    static __device__ __forceinline__ void ss(float (&d)[kN / 2], uint64_t a, uint64_t b,        \
                                              int accumulate) {                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #kI2                                     \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType            \
                   " {" JAX_FLASH_LIST_##kRegs "}, %" #kI0 ", %" #kI1 ", p, 1, 1, %" #kI3 ", 0;\n}" \
                   : JAX_FLASH_REGS_##kRegs                                                      \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed));                         \
    }                                                                                            \
    static __device__ __forceinline__ void rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b, \
                                              int accumulate) {                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #kI5                                     \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType            \
                   " {" JAX_FLASH_LIST_##kRegs "}, {%" #kI0 ", %" #kI1 ", %" #kI2 ", %" #kI3     \
                                               "}, %" #kI4 ", p, 1, 1, 1;\n}"                    \
                   : JAX_FLASH_REGS_##kRegs                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));       \
    }                                                                                            \
  };
#define JAX_FLASH_WGMMA_BOTH(...)                     \
  JAX_FLASH_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
  JAX_FLASH_WGMMA(__half, "f16", __VA_ARGS__)

JAX_FLASH_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
JAX_FLASH_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
JAX_FLASH_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
JAX_FLASH_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
JAX_FLASH_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61)
JAX_FLASH_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
JAX_FLASH_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
JAX_FLASH_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)
// clang-format on

}  // namespace jax_flash::ptx
