/* Large pages for weights. */
#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <sys/mman.h>

#include "region.h"

#ifndef MADV_COLLAPSE /* Linux 6.1 */
#define MADV_COLLAPSE 25
#endif
enum { LARGE_PAGE = 2 << 20, WORTH_IT = 64 << 10 };

/* Weights are read from end to end in every call; with few tokens the walks through small pages are a tenth of the time.
 * ONNX Runtime lays initializers side by side, so what lies around one is mostly others. A kernel or a memory that
 * cannot have it refuses, and nothing changes. */
void spa_use_large_pages(const void* data, int64_t bytes) {
  uintptr_t first = (uintptr_t)data / LARGE_PAGE * LARGE_PAGE, end = (uintptr_t)data + (uintptr_t)bytes;
  if (bytes >= WORTH_IT) madvise((void*)first, (end - first + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, MADV_COLLAPSE);
}
