// device.h of spa_compiler/kernels/cuda for a CPU: the same functions, and what CUDA C++ has built in.

#include <math.h>

#include "threads.h"

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct uint2 {
  uint x, y;
};
struct uint4 {
  uint x, y, z, w;
};
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
static inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
static inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (spa_gpu.current->index)
#define blockIdx spa_block
#define gridDim spa_grid
#define blockDim spa_block_size
#define __syncthreads() spa_barrier(0, 0)

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline uint min(uint a, uint b) { return a < b ? a : b; }
static inline uint max(uint a, uint b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

#define SPA_DEVICE static inline
#define SPA_DYNAMIC_SHARED(type, name) spa_buffer<type> name = {(type*)spa_gpu.shared}

static void spa_put(void* p, const void* value, int size) {
  spa_writes(p, size, value, 0);
  memcpy(p, value, size);
}

// ---- asynchronous copies ----

SPA_DEVICE void spa_cp_async16(void* shared, const void* global) {
  spa_copy_begin(shared, global, 16, 16, "spa_cp_async16");
}
SPA_DEVICE void spa_cp_async16_part(void* shared, const void* global, int valid) {
  spa_copy_begin(shared, global, 16, valid, "spa_cp_async16_part");
}
SPA_DEVICE void spa_cp_async8_part(void* shared, const void* global, int valid) {
  spa_copy_begin(shared, global, 8, valid, "spa_cp_async8_part");
}
SPA_DEVICE void spa_cp_async4_part(void* shared, const void* global, int valid) {
  spa_copy_begin(shared, global, 4, valid, "spa_cp_async4_part");
}
SPA_DEVICE void spa_copy16(void* shared, const void* global, int valid, int align) {
  if (valid < 0 || valid > 16 || valid % 2) spa_fail("spa_copy16: %d bytes", valid);
  if (align >= 16) {
    spa_cp_async16_part(shared, global, valid);
  } else if (align >= 4) {
    for (int i = 0, size = align >= 8 ? 8 : 4; i < 16; i += size) {
      int part = min(max(valid - i, 0), size);
      spa_copy_begin((char*)shared + i, (const char*)global + (part ? i : 0), size, part, "spa_copy16");
    }
  } else {
    char value[16] = {0};
    spa_check_shared(shared, 16, 16, "spa_copy16");
    spa_check(global, valid, 2, "spa_copy16");
    memcpy(value, global, valid);
    spa_put(shared, value, 16);
  }
}
SPA_DEVICE void spa_cp_async_commit() { spa_copy_commit(); }
SPA_DEVICE void spa_cp_async_wait0() { spa_copy_wait(0); }
SPA_DEVICE void spa_cp_async_wait1() { spa_copy_wait(1); }
SPA_DEVICE void spa_cp_async_wait2() { spa_copy_wait(2); }
SPA_DEVICE void spa_cp_async_wait3() { spa_copy_wait(3); }
SPA_DEVICE void spa_cp_async_wait4() { spa_copy_wait(4); }
SPA_DEVICE void spa_cp_async_wait5() { spa_copy_wait(5); }
SPA_DEVICE void spa_cp_async_wait6() { spa_copy_wait(6); }

// ---- vectors ----

static void spa_get(void* value, const void* p, int size) {
  spa_reads(p, size);
  memcpy(value, p, size);
}
static void spa_load(uint* r, const void* p, int size, const char* what) {
  spa_check(p, size, size, what);
  spa_get(r, p, size);
}
static void spa_store(void* p, const uint* r, int size, const char* what) {
  spa_check(p, size, size, what);
  spa_put(p, r, size);
}
SPA_DEVICE void spa_load16(uint* r, const void* p) { spa_load(r, p, 16, "spa_load16"); }
SPA_DEVICE void spa_load8(uint* r, const void* p) { spa_load(r, p, 8, "spa_load8"); }
SPA_DEVICE uint spa_load4(const void* p) {
  uint v;
  spa_load(&v, p, 4, "spa_load4");
  return v;
}
static void spa_load_once(uint* r, const void* p, int size, const char* what) {
  if (spa_shared_place(p) >= 0) spa_fail("%s: ld.global of shared memory", what);
  spa_load(r, p, size, what);
}
SPA_DEVICE void spa_load16_once(uint* r, const void* p) { spa_load_once(r, p, 16, "spa_load16_once"); }
SPA_DEVICE void spa_load8_once(uint* r, const void* p) { spa_load_once(r, p, 8, "spa_load8_once"); }
SPA_DEVICE void spa_load8_once_at(uint* r, const void* p, int bytes) { spa_load8_once(r, (const char*)p + bytes); }
SPA_DEVICE void spa_load16_once_at(uint* r, const void* p, int bytes) { spa_load16_once(r, (const char*)p + bytes); }
SPA_DEVICE void spa_store16(void* p, const uint* r) { spa_store(p, r, 16, "spa_store16"); }
SPA_DEVICE void spa_store8(void* p, const uint* r) { spa_store(p, r, 8, "spa_store8"); }
SPA_DEVICE void spa_store4(void* p, uint r) { spa_store(p, &r, 4, "spa_store4"); }
SPA_DEVICE uint spa_load2_at(const void* p, int bytes) {
  uint v = 0;
  spa_load(&v, (const char*)p + bytes, 2, "spa_load2_at");
  return v;
}
SPA_DEVICE void spa_store2_at(void* p, int bytes, uint r) { spa_store((char*)p + bytes, &r, 2, "spa_store2_at"); }
SPA_DEVICE void spa_store2(void* p, uint r) { spa_store(p, &r, 2, "spa_store2"); }
static void spa_check_part(const void* p, int valid, int align, const char* what) {
  if (valid > 16) valid = 16;
  if (valid < 0 || valid % 2) spa_fail("%s: %d bytes", what, valid);
  spa_check(p, valid, align >= 16 && valid == 16 ? 16 : align >= 4 ? 4 : 2, what);
}
SPA_DEVICE void spa_load16_part(uint* r, const void* p, int valid, int align) {
  spa_check_part(p, valid, align, "spa_load16_part");
  memset(r, 0, 16);
  spa_get(r, p, min(valid, 16));
}
SPA_DEVICE void spa_store16_part(void* p, const uint* r, int valid, int align) {
  spa_check_part(p, valid, align, "spa_store16_part");
  spa_put(p, r, min(valid, 16));
}

// ---- numbers of 16 bits ----

SPA_DEVICE float spa_as_float(uint bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
SPA_DEVICE uint spa_as_uint(float f) {
  uint bits;
  memcpy(&bits, &f, 4);
  return bits;
}
SPA_DEVICE float spa_from_fp16(uint h) {
  uint sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return spa_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return spa_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  float small = (float)mantissa * 0x1p-24f;
  return sign ? -small : small;
}
SPA_DEVICE ushort spa_to_fp16(float f) {
  uint bits = spa_as_uint(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;                     // NaN
  if (size >= 0x477ff000u) return (ushort)(sign | 0x7c00u);  // from 65520 on
  if (size < 0x38800000u) {  // denormal: adding 0.5 leaves multiples of 2^-24 in the last bits
    return (ushort)(sign | (spa_as_uint(spa_as_float(size) + 0.5f) - 0x3f000000u));
  }
  return (ushort)(sign | ((size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13));
}
SPA_DEVICE float spa_from_bf16(uint h) { return spa_as_float(h << 16); }
SPA_DEVICE ushort spa_to_bf16(float f) {
  uint bits = spa_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (ushort)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
SPA_DEVICE float spa_from_fp16x2_low(uint v) { return spa_from_fp16(v & 0xffffu); }
SPA_DEVICE float spa_from_fp16x2_high(uint v) { return spa_from_fp16(v >> 16); }
SPA_DEVICE float spa_from_bf16x2_low(uint v) { return spa_as_float(v << 16); }
SPA_DEVICE float spa_from_bf16x2_high(uint v) { return spa_as_float(v & 0xffff0000u); }
SPA_DEVICE uint spa_to_fp16x2(float low, float high) { return spa_to_fp16(low) | (uint)spa_to_fp16(high) << 16; }
SPA_DEVICE uint spa_to_bf16x2(float low, float high) { return spa_to_bf16(low) | (uint)spa_to_bf16(high) << 16; }
SPA_DEVICE uint spa_to_tf32(float f) {
  uint bits = spa_as_uint(f);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}
SPA_DEVICE uint spa_fma_fp16x2(uint a, uint b, uint c) {
  // Exact in double, so rounded once but for ties that the way over float makes.
  float low = (float)((double)spa_from_fp16x2_low(a) * spa_from_fp16x2_low(b) + spa_from_fp16x2_low(c));
  float high = (float)((double)spa_from_fp16x2_high(a) * spa_from_fp16x2_high(b) + spa_from_fp16x2_high(c));
  return spa_to_fp16x2(low, high);
}
SPA_DEVICE uint spa_fma_bf16x2(uint a, uint b, uint c) {
  float low = (float)((double)spa_from_bf16x2_low(a) * spa_from_bf16x2_low(b) + spa_from_bf16x2_low(c));
  float high = (float)((double)spa_from_bf16x2_high(a) * spa_from_bf16x2_high(b) + spa_from_bf16x2_high(c));
  return spa_to_bf16x2(low, high);
}
SPA_DEVICE uint spa_and_or(uint v, uint mask, uint bits) { return v & mask | bits; }
SPA_DEVICE int spa_popc(uint v) { return __builtin_popcount(v); }
SPA_DEVICE uint spa_byte_perm(uint a, uint b, uint selector) {
  uint64_t both = a | (uint64_t)b << 32;
  uint v = 0;
  for (int i = 0; i < 4; ++i) v |= (uint)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return v;
}

// ---- tensor cores ----

static void spa_run_ldmatrix(spa_thread* lanes) {
  int count = lanes[0].argument >> 1, transposed = lanes[0].argument & 1;
  for (int m = 0; m < count; ++m) {
    for (int lane = 0; lane < SPA_LANES; ++lane) {
      uint v = 0;
      for (int i = 0; i < 2; ++i) {
        int row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
        v |= (uint)((const ushort*)lanes[8 * m + row].in[0])[column] << 16 * i;
      }
      ((uint*)lanes[lane].out)[m] = v;
    }
  }
}
static void spa_ldmatrix(uint* r, const void* shared, int count, int transposed, const char* what) {
  spa_thread* self = spa_gpu.current;
  if (self->number % SPA_LANES < 8 * count) {
    spa_check_shared(shared, 16, 16, what);
    spa_reads(shared, 16);
  }
  self->in[0] = shared, self->out = r, self->argument = count << 1 | transposed;
  spa_together(what, spa_run_ldmatrix);
}
SPA_DEVICE void spa_ldmatrix_x4(uint* r, const void* shared) { spa_ldmatrix(r, shared, 4, 0, "spa_ldmatrix_x4"); }
SPA_DEVICE void spa_ldmatrix_x4_trans(uint* r, const void* shared) {
  spa_ldmatrix(r, shared, 4, 1, "spa_ldmatrix_x4_trans");
}
SPA_DEVICE void spa_ldmatrix_x2(uint* r, const void* shared) { spa_ldmatrix(r, shared, 2, 0, "spa_ldmatrix_x2"); }
SPA_DEVICE void spa_ldmatrix_x2_trans(uint* r, const void* shared) {
  spa_ldmatrix(r, shared, 2, 1, "spa_ldmatrix_x2_trans");
}

enum { SPA_FP16, SPA_BF16, SPA_TF32 };

static inline float spa_part(uint v, int i, int type) {
  return type == SPA_TF32   ? spa_as_float(v & 0xffffe000u)
         : type == SPA_FP16 ? spa_from_fp16(v >> 16 * i & 0xffffu)
                            : spa_as_float(v >> 16 * i << 16);
}

// d += a b of a [16, k] and b [k, 8], both as float.
static void spa_multiply(spa_thread* lanes, const float* a, const float* b, int k) {
  for (int lane = 0; lane < SPA_LANES; ++lane) {
    float* d = (float*)lanes[lane].out;
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int j = 0; j < k; ++j) sum += (double)a[row * k + j] * b[j * 8 + column];
      d[i] = (float)sum;
    }
  }
}

// argument: type, then for sparse ones 4 and the selector
static void spa_run_mma(spa_thread* lanes) {
  int type = lanes[0].argument & 3, sparse = lanes[0].argument >> 2 & 1, selector = lanes[0].argument >> 3;
  int pair = type == SPA_TF32 ? 1 : 2, own = 8 * pair, k = sparse ? 2 * own : own;
  float stored[16 * 16], a[16 * 32] = {0}, b[32 * 8];
  for (int lane = 0; lane < SPA_LANES; ++lane) {
    const uint *ra = (const uint*)lanes[lane].in[0], *rb = (const uint*)lanes[lane].in[1];
    int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < pair; ++i)
        stored[(g + r % 2 * 8) * own + r / 2 * 4 * pair + pair * t + i] = spa_part(ra[r], i, type);
    }
    for (int r = 0; r < k / (4 * pair); ++r) {
      for (int i = 0; i < pair; ++i) b[(r * 4 * pair + pair * t + i) * 8 + g] = spa_part(rb[r], i, type);
    }
  }
  if (!sparse) {
    spa_multiply(lanes, stored, b, k);
    return;
  }
  for (int row = 0; row < 16; ++row) {
    for (int group = 0; group < 8; ++group) {  // of four columns, of which two are stored
      // The first lane of the pair has columns 0..15, the second 16..31; the low half row g, the high half row g + 8.
      uint places = *(const uint*)lanes[row % 8 * 4 + selector * 2 + group / 4].in[2] >> row / 8 * 16 >> group % 4 * 4;
      int first = places & 3, second = places >> 2 & 3;
      if (first >= second) spa_fail("spa_mma_sparse: places %d and %d are not in order", first, second);
      a[row * 32 + group * 4 + first] = stored[row * 16 + group * 2];
      a[row * 32 + group * 4 + second] = stored[row * 16 + group * 2 + 1];
    }
  }
  spa_multiply(lanes, a, b, k);
}
static void spa_mma(float* d, const uint* a, const uint* b, const uint* places, int argument, const char* what) {
  spa_thread* self = spa_gpu.current;
  self->in[0] = a, self->in[1] = b, self->in[2] = places, self->out = d, self->argument = argument;
  spa_together(what, spa_run_mma);
}
SPA_DEVICE void spa_mma_fp16(float* d, const uint* a, const uint* b) {
  spa_mma(d, a, b, nullptr, SPA_FP16, "spa_mma_fp16");
}
SPA_DEVICE void spa_mma_bf16(float* d, const uint* a, const uint* b) {
  spa_mma(d, a, b, nullptr, SPA_BF16, "spa_mma_bf16");
}
SPA_DEVICE void spa_mma_tf32(float* d, const uint* a, const uint* b) {
  spa_mma(d, a, b, nullptr, SPA_TF32, "spa_mma_tf32");
}
#define SPA_MMA_SPARSE(NAME, TYPE, SELECTOR)                                  \
  SPA_DEVICE void NAME(float* d, const uint* a, const uint* b, uint places) { \
    spa_mma(d, a, b, &places, TYPE | 4 | SELECTOR << 3, #NAME);               \
  }
SPA_MMA_SPARSE(spa_mma_sparse_fp16_first, SPA_FP16, 0)
SPA_MMA_SPARSE(spa_mma_sparse_fp16_second, SPA_FP16, 1)
SPA_MMA_SPARSE(spa_mma_sparse_bf16_first, SPA_BF16, 0)
SPA_MMA_SPARSE(spa_mma_sparse_bf16_second, SPA_BF16, 1)

// ---- between lanes ----

static void spa_run_shuffle(spa_thread* lanes) {
  for (int lane = 0; lane < SPA_LANES; ++lane)
    *(uint*)lanes[lane].out = *(const uint*)lanes[lanes[lane].argument & 31].in[0];
}
static uint spa_shuffle_from(uint v, int lane, const char* what) {
  spa_thread* self = spa_gpu.current;
  uint got = 0;
  self->in[0] = &v, self->out = &got, self->argument = lane;
  spa_together(what, spa_run_shuffle);
  return got;
}
SPA_DEVICE uint spa_shuffle_u32(uint v, int lane) { return spa_shuffle_from(v, lane, "spa_shuffle"); }
SPA_DEVICE float spa_shuffle(float v, int lane) {
  return spa_as_float(spa_shuffle_from(spa_as_uint(v), lane, "spa_shuffle"));
}
SPA_DEVICE uint spa_shuffle_xor_u32(uint v, int mask) {
  return spa_shuffle_from(v, (spa_gpu.current->number & 31) ^ mask, "spa_shuffle_xor");
}
SPA_DEVICE int spa_before(int v) {
  int lane = spa_gpu.current->number & 31, sum = v;
  for (int i = 1; i < 32; i *= 2) {
    int other = (int)spa_shuffle_from((uint)sum, lane >= i ? lane - i : lane, "spa_before");
    if (lane >= i) sum += other;
  }
  return sum - v;
}
SPA_DEVICE uint spa_pair(uint bits, int at, const void* values, int* place) {
  uint number[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    if (bits >> (at + i) & 1) {
      const ushort* p = (const ushort*)((const char*)values + *place);
      spa_check(p, 2, 2, "spa_pair");
      spa_get(&number[i], p, 2);
      *place += 2;
    }
  }
  return number[0] | number[1] << 16;
}
SPA_DEVICE float spa_shuffle_xor(float v, int mask) { return spa_as_float(spa_shuffle_xor_u32(spa_as_uint(v), mask)); }
SPA_DEVICE float spa_warp_sum(float v) {
  for (int mask = 16; mask; mask >>= 1) v += spa_shuffle_xor(v, mask);
  return v;
}
static void spa_run_nothing(spa_thread*) {}
SPA_DEVICE void spa_syncwarp() {
  spa_together("spa_syncwarp", spa_run_nothing);
  ++spa_gpu.current->warp_barriers;
}

// ---- activations ----

SPA_DEVICE float spa_act_none(float x, float, float) { return x; }
SPA_DEVICE float spa_act_relu(float x, float, float) { return x < 0.f ? 0.f : x; }
SPA_DEVICE float spa_act_clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
SPA_DEVICE float spa_act_sigmoid(float x, float, float) { return 1.f / (1.f + expf(-x)); }
SPA_DEVICE float spa_act_silu(float x, float, float) { return x / (1.f + expf(-x)); }
SPA_DEVICE float spa_act_gelu_erf(float x, float, float) { return .5f * x * (1.f + erff(x * .70710678118654752f)); }
SPA_DEVICE float spa_act_gelu_tanh(float x, float, float) {
  float y = 1.5957691216057308f * (x + .044715f * x * x * x);
  return x / (1.f + expf(-y));
}
SPA_DEVICE float spa_act_hard_sigmoid(float x, float low, float high) {
  float y = low * x + high;
  return y < 0.f ? 0.f : y > 1.f ? 1.f : y;
}
SPA_DEVICE float spa_act_hard_swish(float x, float, float) { return x * spa_act_hard_sigmoid(x, 1.f / 6.f, .5f); }
SPA_DEVICE float spa_act_leaky_relu(float x, float low, float) { return x < 0.f ? low * x : x; }
