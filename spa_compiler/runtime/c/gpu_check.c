/* What packed arrays must look like. Models are untrusted, and an index that is wrong is an access out of bounds on the GPU, so
 * sizes are compared with n and k, and integers that kernels index with are looked at, once, when a session is made. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "gpu.h"

size_t spa_element_bytes(int type) {
  switch (type) {
    case ELEMENT_UINT8: case ELEMENT_INT8: return 1;
    case ELEMENT_UINT16: case ELEMENT_INT16: case ELEMENT_FLOAT16: case ELEMENT_BFLOAT16: return 2;
    case ELEMENT_FLOAT: case ELEMENT_INT32: case ELEMENT_UINT32: return 4;
    case ELEMENT_INT64: return 8;
    default: return 0;
  }
}

static int refuse(char words[GPU_WORDS], const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(words, GPU_WORDS, format, arguments);
  va_end(arguments);
  return 0;
}

/* Without `count` and `plus`; -1 where it is too large to be a size. */
static int64_t factors(const GpuExtent* e, const GpuSizes* s) {
  int64_t value = e->times;
  int64_t tiles[] = {e->rows ? (s->n + e->rows - 1) / e->rows : 1, e->columns ? (s->k + e->columns - 1) / e->columns : 1};
  for (int i = 0; i < 2; ++i)
    if (__builtin_mul_overflow(value, tiles[i], &value) || value > INT32_MAX) return -1;
  return value;
}

static int64_t extent(const GpuExtent* e, const GpuSizes* s) {
  int64_t value = factors(e, s);
  if (value < 0 || (e->count >= 0 && (__builtin_mul_overflow(value, s->counts[e->count], &value) || value > INT32_MAX)))
    return -1;
  return value + e->plus;
}

int spa_gpu_fits(const GpuArray* a, GpuSizes* s, const int64_t* dims, char words[GPU_WORDS]) {
  int64_t size = 1;
  for (int i = 0; i < a->rank; ++i) {
    const GpuExtent* e = a->dims + i;
    if (e->count >= 0 && s->counts[e->count] < 0) {
      int64_t each = factors(e, s), rest = dims[i] - e->plus;
      if (each < 1 || rest < 0 || rest % each)
        return refuse(words, "%s has %" PRId64 " on axis %d, which must be %" PRId64 " more than a multiple of %" PRId64,
                      a->name, dims[i], i, e->plus, each);
      s->counts[e->count] = rest / each;
    }
    int64_t wanted = extent(e, s);
    if (dims[i] != wanted)
      return refuse(words, "%s must have %" PRId64 " on axis %d, it has %" PRId64, a->name, wanted, i, dims[i]);
    if (__builtin_mul_overflow(size, dims[i], &size) || size > INT32_MAX) return refuse(words, "%s is too large", a->name);
  }
  return 1;
}

static int64_t element(const GpuArray* a, const void* data, int64_t i) {
  int64_t v = 0;
  switch (a->type) {
    case ELEMENT_UINT8: v = ((const uint8_t*)data)[i]; break;
    case ELEMENT_INT8: v = ((const int8_t*)data)[i]; break;
    case ELEMENT_UINT16: v = ((const uint16_t*)data)[i]; break;
    case ELEMENT_INT16: v = ((const int16_t*)data)[i]; break;
    case ELEMENT_INT32: v = ((const int32_t*)data)[i]; break;
    case ELEMENT_UINT32: v = ((const uint32_t*)data)[i]; break;
    case ELEMENT_INT64: v = ((const int64_t*)data)[i]; break;
    default: return -1; /* no integer, so no index */
  }
  return a->mask ? (int64_t)(((uint64_t)v >> a->shift) & a->mask) : v;
}

int spa_gpu_sound(const GpuArray* a, const GpuSizes* s, const void* data, int64_t size, char words[GPU_WORDS]) {
  int64_t bound = extent(&a->bound, s), before = 0;
  unsigned char* seen = NULL;
  if (a->check == GPU_ANY) return 1;
  if (a->check == GPU_PERMUTATION) {
    if (size != bound)
      return refuse(words, "%s must have %" PRId64 " elements, it has %" PRId64, a->name, bound, size);
    if (!(seen = calloc((size_t)size + 1, 1))) return refuse(words, "out of memory");
  }
  if (a->check == GPU_OFFSETS && (size < 1 || element(a, data, 0) != 0 || element(a, data, size - 1) != bound))
    return refuse(words, "%s must run from 0 to %" PRId64, a->name, bound);
  int sound = 1;
  for (int64_t i = 0; sound && i < size; ++i) {
    int64_t v = element(a, data, i);
    if (a->check == GPU_OFFSETS) {
      if (v < before) sound = refuse(words, "%s must not decrease, element %" PRId64 " does", a->name, i);
      before = v;
    } else if (v < 0 || v >= bound) {
      sound = refuse(words, "%s: element %" PRId64 " is %" PRId64 ", out of range: it must be below %" PRId64, a->name, i, v,
                     bound);
    } else if (seen && seen[v]++) {
      sound = refuse(words, "%s is not a permutation of %" PRId64 ": %" PRId64 " is in it twice", a->name, bound, v);
    }
  }
  free(seen);
  return sound;
}
