/* What roofline.py times: the peaks of the machine, and kernels as steps.c calls them, on several weights in turn. */
#include "region.h"

enum { CHAINS = 20, WIDTH = LANES }; /* more chains than the latency of a multiply-add times two a cycle */
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

/* Multiply-adds of whole registers, which depend on nothing: 2 CHAINS WIDTH `count` floating point operations. */
float peak(int64_t count, float x) {
  Vector sums[CHAINS], a, b;
  for (int w = 0; w < WIDTH; ++w) a[w] = x, b[w] = 1.0f - x;
  for (int i = 0; i < CHAINS; ++i) sums[i] = a * (float)i;
  for (int64_t n = 0; n < count; ++n)
#pragma clang loop unroll(full)
    for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * a + b;
  float all = 0;
  for (int i = 0; i < CHAINS; ++i)
    for (int w = 0; w < WIDTH; ++w) all += sums[i][w];
  return all;
}

/* The sum of `count` floats, a multiple of 4 WIDTH: reads memory and does next to nothing, prefetching as kernels do. */
float stream(const float* from, int64_t count) {
  Vector sums[4] = {{0}}, v;
  for (int64_t at = 0; at < count; at += 4 * WIDTH)
    for (int i = 0; i < 4; ++i) {
      if ((i * WIDTH) % 16 == 0) __builtin_prefetch(from + at + i * WIDTH + 2048, 0, 3);
      __builtin_memcpy(&v, from + at + i * WIDTH, sizeof v);
      sums[i] += v;
    }
  float all = 0;
  for (int i = 0; i < 4; ++i)
    for (int w = 0; w < WIDTH; ++w) all += sums[i][w];
  return all;
}

/* `count` weights one after the other, each on `tiles` panel tiles, as linear steps go through them: chunk by chunk over
 * all tiles, during the last of which what comes next is fetched. */
void products(Multiply* kernel, const void* const* const* weights, int64_t count, int64_t n, int64_t k, int64_t rows,
              int64_t chunk, int64_t k_block, int64_t interleaved, int64_t lanes, int64_t tiles, const float* panel,
              float* out) {
  Multiply* const kernels[] = {kernel};
  LinearInfo w = {.n = n, .k = k, .rows = rows, .chunk = chunk, .k_block = k_block, .interleaved = interleaved,
                  .kernels = kernels};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < blocks_of(n, chunk); ++c)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (tile == tiles - 1) {
          if (c + 1 < blocks_of(n, chunk))
            spa_fetch_chunk(&w, weights[i], c + 1);
          else if (i + 1 < count)
            spa_fetch_chunk(&w, weights[i + 1], 0);
        }
        spa_add_product(&w, weights[i], 0, (Rows){panel + tile * spa_rows(k) * lanes, lanes}, NULL, c, START_BIAS, 1,
                        (Rows){0, lanes}, (Rows){out + (tile * spa_rows(n) + c * chunk) * lanes, lanes});
      }
}
