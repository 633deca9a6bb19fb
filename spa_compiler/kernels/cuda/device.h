// What a generated CUDA kernel may call: the GPU's instructions that TVM has no expression for, one function each.
//
// The kernel's source is this file and what TVM printed; nothing is included, so NVRTC alone compiles it. Data of 16
// bits is handled as words: no half types. tests/cuda_emulator/device.h declares the same functions for a CPU, so that
// every kernel's arithmetic, barriers and copies are tested without a GPU. A function added here is added there.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8"; CUTLASS states the same as layouts, against
// which tests/cuda_emulator/test_layouts.py holds the kernels): lane = 4 * g + t, g = 0..7, t = 0..3.
//   d of 16 x 8       d0, d1: row g, columns 2 t, 2 t + 1         d2, d3: row g + 8
//   a of 16 x 16      a0: row g, columns 2 t, 2 t + 1 (low half first)   a1: row g + 8   a2, a3: the same, columns + 8
//   b of 16 x 8       b0: rows 2 t, 2 t + 1, column g             b1: rows + 8
//   tf32, a of 16 x 8 a0: row g, column t   a1: row g + 8   a2, a3: the same, column t + 4;   b of 8 x 8  b0: row t,
// column g   b1: row t + 4

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

#define SPA_DEVICE static __device__ __forceinline__

// The one buffer of dynamic shared memory that a kernel has.
#define SPA_DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

SPA_DEVICE uint spa_shared_address(const void* shared) { return (uint)__cvta_generic_to_shared(shared); }

// ---- asynchronous copies, global -> shared: they have landed after a wait, and others see them after a barrier ----
// Forms, sizes and what fills up are those of CUDA's own cuda_pipeline_helpers.h. An address in global memory is the
// same as a generic one.

// 16 bytes, past L1; both addresses are multiples of 16.
SPA_DEVICE void spa_cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(spa_shared_address(shared)), "l"(global) : "memory");
}

// The first `valid` (0 to 16) of 16 bytes; the others become zeros and are not read. With 0, `global` is any aligned
// address.
SPA_DEVICE void spa_cp_async16_part(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(spa_shared_address(shared)), "l"(global),
               "r"(valid)
               : "memory");
}

// 8 and 4 bytes, through L1, aligned to their size; `valid` as above.
SPA_DEVICE void spa_cp_async8_part(void* shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(spa_shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
SPA_DEVICE void spa_cp_async4_part(void* shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(spa_shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}

// The first `valid` (0 to 16, in whole numbers of 16 bits) bytes from an address that is a multiple of `align` (16, 8,
// 4, else 2): rows of lengths that are no multiple of 16 bytes. `align` is the same in all threads. Without 4, the
// copy is not asynchronous.
SPA_DEVICE void spa_copy16(void* shared, const void* global, int valid, int align) {
  if (align >= 16) {
    spa_cp_async16_part(shared, global, valid);
  } else if (align >= 8) {
    for (int i = 0; i < 16; i += 8) {
      int part = min(max(valid - i, 0), 8);
      spa_cp_async8_part((char*)shared + i, (const char*)global + (part ? i : 0), part);
    }
  } else if (align >= 4) {
    for (int i = 0; i < 16; i += 4) {
      int part = min(max(valid - i, 0), 4);
      spa_cp_async4_part((char*)shared + i, (const char*)global + (part ? i : 0), part);
    }
  } else {
    for (int i = 0; i < 8; ++i) ((ushort*)shared)[i] = 2 * i < valid ? ((const ushort*)global)[i] : (ushort)0;
  }
}

// Ends a group of this thread's copies.
SPA_DEVICE void spa_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are in flight.
#define SPA_WAIT(N) \
  SPA_DEVICE void spa_cp_async_wait##N() { asm volatile("cp.async.wait_group " #N ";" ::: "memory"); }
SPA_WAIT(0)
SPA_WAIT(1)
SPA_WAIT(2)
SPA_WAIT(3)
SPA_WAIT(4)
SPA_WAIT(5)
SPA_WAIT(6)
#undef SPA_WAIT

// ---- whole vectors between registers and memory of any kind; addresses are multiples of the size ----

SPA_DEVICE void spa_load16(uint* r, const void* p) {
  uint4 v = *(const uint4*)p;
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
SPA_DEVICE void spa_load8(uint* r, const void* p) {
  uint2 v = *(const uint2*)p;
  r[0] = v.x, r[1] = v.y;
}
SPA_DEVICE uint spa_load4(const void* p) { return *(const uint*)p; }
// Global memory that is read once: it does not push anything out of L1.
SPA_DEVICE void spa_load16_once(uint* r, const void* p) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(p));
}
SPA_DEVICE void spa_load8_once(uint* r, const void* p) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}
SPA_DEVICE void spa_load8_once_at(uint* r, const void* p, int bytes) { spa_load8_once(r, (const char*)p + bytes); }
SPA_DEVICE void spa_load16_once_at(uint* r, const void* p, int bytes) { spa_load16_once(r, (const char*)p + bytes); }
SPA_DEVICE void spa_store16(void* p, const uint* r) { *(uint4*)p = make_uint4(r[0], r[1], r[2], r[3]); }
SPA_DEVICE void spa_store8(void* p, const uint* r) { *(uint2*)p = make_uint2(r[0], r[1]); }
SPA_DEVICE void spa_store4(void* p, uint r) { *(uint*)p = r; }
SPA_DEVICE uint spa_load2_at(const void* p, int bytes) { return *(const ushort*)((const char*)p + bytes); }
SPA_DEVICE void spa_store2_at(void* p, int bytes, uint r) { *(ushort*)((char*)p + bytes) = (ushort)r; }
SPA_DEVICE void spa_store2(void* p, uint r) { *(ushort*)p = (ushort)r; }

// The first `valid` bytes of 16, zeros for the others, from or to an address that is a multiple of `align`, as in
// spa_copy16.
SPA_DEVICE void spa_load16_part(uint* r, const void* p, int valid, int align) {
  if (align >= 16 && valid >= 16) {
    spa_load16(r, p);
  } else if (align >= 4) {
    for (int i = 0; i < 4; ++i) {
      r[i] = 4 * i + 4 <= valid ? ((const uint*)p)[i] : 4 * i + 2 <= valid ? (uint)((const ushort*)p)[2 * i] : 0u;
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      uint low = 4 * i + 2 <= valid ? ((const ushort*)p)[2 * i] : 0u;
      uint high = 4 * i + 4 <= valid ? ((const ushort*)p)[2 * i + 1] : 0u;
      r[i] = low | high << 16;
    }
  }
}
SPA_DEVICE void spa_store16_part(void* p, const uint* r, int valid, int align) {
  if (align >= 16 && valid >= 16) {
    spa_store16(p, r);
  } else {
    for (int i = 0; i < 4; ++i) {
      if (align >= 4 && 4 * i + 4 <= valid) {
        ((uint*)p)[i] = r[i];
      } else {
        if (4 * i + 2 <= valid) ((ushort*)p)[2 * i] = (ushort)r[i];
        if (4 * i + 4 <= valid) ((ushort*)p)[2 * i + 1] = (ushort)(r[i] >> 16);
      }
    }
  }
}

// ---- numbers of 16 bits, one or two in a word (the first in the low half) ----

SPA_DEVICE float spa_from_fp16(uint h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((ushort)h));
  return f;
}
SPA_DEVICE float spa_from_bf16(uint h) { return __uint_as_float(h << 16); }
SPA_DEVICE ushort spa_to_fp16(float f) {
  ushort h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
SPA_DEVICE ushort spa_to_bf16(float f) {
  ushort h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
SPA_DEVICE float spa_from_fp16x2_low(uint v) { return spa_from_fp16(v & 0xffffu); }
SPA_DEVICE float spa_from_fp16x2_high(uint v) { return spa_from_fp16(v >> 16); }
SPA_DEVICE float spa_from_bf16x2_low(uint v) { return __uint_as_float(v << 16); }
SPA_DEVICE float spa_from_bf16x2_high(uint v) { return __uint_as_float(v & 0xffff0000u); }
// The first source becomes the high half (PTX ISA, "cvt"; so does CUDA's cuda_fp16.hpp).
SPA_DEVICE uint spa_to_fp16x2(float low, float high) {
  uint v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
SPA_DEVICE uint spa_to_bf16x2(float low, float high) {
  uint v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// To the nearest TF32 (10 bits of mantissa, ties away from zero), as bits.
SPA_DEVICE uint spa_to_tf32(float f) {
  uint v;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(f));
  return v;
}
// a * b + c of two halves each, rounded once.
SPA_DEVICE uint spa_fma_fp16x2(uint a, uint b, uint c) {
  uint d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
SPA_DEVICE uint spa_fma_bf16x2(uint a, uint b, uint c) {
  uint d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
SPA_DEVICE float spa_as_float(uint bits) { return __uint_as_float(bits); }
SPA_DEVICE uint spa_as_uint(float f) { return __float_as_uint(f); }
SPA_DEVICE int spa_popc(uint v) { return __popc(v); }
// v & mask | bits as the one instruction that it is, where the compiler would rather have two with constants in them.
// Its table is the expression itself, of 0xf0, 0xcc and 0xaa (PTX ISA, "lop3"): 0xf0 & 0xcc | 0xaa.
SPA_DEVICE uint spa_and_or(uint v, uint mask, uint bits) {
  uint d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
  return d;
}
// Bytes of (a, low) and (b, high) by the nibbles of the selector: PTX prmt.
SPA_DEVICE uint spa_byte_perm(uint a, uint b, uint selector) { return __byte_perm(a, b, selector); }

// ---- tensor cores; all lanes of a warp together ----

// 8 x 8 matrices of 16-bit numbers: lanes 8 i .. 8 i + 7 give the addresses (multiples of 16) of the rows of matrix i;
// lane 4 g + t gets columns 2 t, 2 t + 1 of row g, or, transposed, of column g.
SPA_DEVICE void spa_ldmatrix_x4(uint* r, const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(spa_shared_address(shared))
               : "memory");
}
SPA_DEVICE void spa_ldmatrix_x4_trans(uint* r, const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(spa_shared_address(shared))
               : "memory");
}
SPA_DEVICE void spa_ldmatrix_x2(uint* r, const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(spa_shared_address(shared))
               : "memory");
}
SPA_DEVICE void spa_ldmatrix_x2_trans(uint* r, const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(spa_shared_address(shared))
               : "memory");
}

// d += a b
#define SPA_MMA(NAME, SHAPE)                                                                                  \
  SPA_DEVICE void NAME(float* d, const uint* a, const uint* b) {                                              \
    asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
  }
SPA_MMA(spa_mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
SPA_MMA(spa_mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SPA_MMA(spa_mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SPA_MMA

// d += a b with a [16, 32] in 2:4: a holds the two of every four columns, as the fragment of a 16 x 16 matrix; b is
// [32, 8], b[i] has rows 8 i + 2 t, 8 i + 2 t + 1. A nibble of `places` says which two of four columns, the lower
// first: the low half is row g, the high half row g + 8; lane t = 0 has columns 0..15, t = 1 columns 16..31. _second
// takes them from lanes t = 2 and 3 instead (PTX ISA, "Sparse matrix storage", and for the order in a word CUTLASS's
// reorder_meta). Places in order have an instruction of their own from CUDA 12.5 (PTX 8.5) on, which PTX ISA advises:
// the one that takes them in any order, too, may be much slower on some GPUs.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define SPA_SPARSE "mma.sp::ordered_metadata"
#else
#define SPA_SPARSE "mma.sp"
#endif
#define SPA_MMA_SPARSE(NAME, TYPE, SELECTOR)                                                                         \
  SPA_DEVICE void NAME(float* d, const uint* a, const uint* b, uint places) {                                        \
    asm volatile(SPA_SPARSE                                                                                          \
                 ".sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                                                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " SELECTOR ";" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),           \
                   "r"(places));                                                                                     \
  }
SPA_MMA_SPARSE(spa_mma_sparse_fp16_first, "f16", "0x0")
SPA_MMA_SPARSE(spa_mma_sparse_fp16_second, "f16", "0x1")
SPA_MMA_SPARSE(spa_mma_sparse_bf16_first, "bf16", "0x0")
SPA_MMA_SPARSE(spa_mma_sparse_bf16_second, "bf16", "0x1")
#undef SPA_MMA_SPARSE
#undef SPA_SPARSE

// ---- between the lanes of a warp, all of them together ----

SPA_DEVICE float spa_shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
SPA_DEVICE uint spa_shuffle_xor_u32(uint v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
SPA_DEVICE float spa_shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
SPA_DEVICE uint spa_shuffle_u32(uint v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
SPA_DEVICE float spa_warp_sum(float v) {
  for (int mask = 16; mask; mask >>= 1) v += spa_shuffle_xor(v, mask);
  return v;
}
SPA_DEVICE void spa_syncwarp() { __syncwarp(); }
// The sum of v over the lanes before this one.
SPA_DEVICE int spa_before(int v) {
  int lane = threadIdx.x & 31, sum = v;
  for (int i = 1; i < 32; i *= 2) {
    int other = __shfl_up_sync(0xffffffffu, sum, i);
    if (lane >= i) sum += other;
  }
  return sum - v;
}

// The numbers of 16 bits that bits `at` and `at` + 1 stand for, as a word: where a bit is set the one at values + *place,
// which then moves on by 2, else zero.
SPA_DEVICE uint spa_pair(uint bits, int at, const void* values, int* place) {
  uint low = 0, high = 0;
  if (bits >> at & 1) {
    low = *(const ushort*)((const char*)values + *place);
    *place += 2;
  }
  if (bits >> at & 2) {
    high = *(const ushort*)((const char*)values + *place);
    *place += 2;
  }
  return spa_byte_perm(low, high, 0x5410);
}

// ---- activations, named as in kernels/activation.py; `low` and `high` are used by those that have
// bounds ----

SPA_DEVICE float spa_act_none(float x, float, float) { return x; }
// Comparisons, not fmaxf: NaN stays NaN.
SPA_DEVICE float spa_act_relu(float x, float, float) { return x < 0.f ? 0.f : x; }
SPA_DEVICE float spa_act_clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
SPA_DEVICE float spa_act_sigmoid(float x, float, float) { return 1.f / (1.f + __expf(-x)); }
SPA_DEVICE float spa_act_silu(float x, float, float) { return x / (1.f + __expf(-x)); }
SPA_DEVICE float spa_act_gelu_erf(float x, float, float) { return .5f * x * (1.f + erff(x * .70710678118654752f)); }
SPA_DEVICE float spa_act_gelu_tanh(float x, float, float) {
  float y = 1.5957691216057308f * (x + .044715f * x * x * x);  // x sigmoid(y) = x (1 + tanh(y / 2)) / 2
  return x / (1.f + __expf(-y));
}
SPA_DEVICE float spa_act_hard_sigmoid(float x, float low, float high) {
  float y = low * x + high;
  return y < 0.f ? 0.f : y > 1.f ? 1.f : y;
}
SPA_DEVICE float spa_act_hard_swish(float x, float, float) { return x * spa_act_hard_sigmoid(x, 1.f / 6.f, .5f); }
SPA_DEVICE float spa_act_leaky_relu(float x, float low, float) { return x < 0.f ? low * x : x; }
