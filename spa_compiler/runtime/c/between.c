/* What stands between two convolutions and has no weight: means, sums and products of images, pixels that are repeated or
 * left out. */
#include <string.h>

#include "region.h"

enum { SUMS = 16 }; /* that run side by side, so that they fill registers whatever those hold */

typedef struct {
  const CombineInfo* info;
  const Image *from, *other, *to;
  int64_t channels, registers;
  const int64_t *grow, *stride;
} Step;

static void mean_item(void* user, size_t channel) {
  const Step* s = user;
  const float* x = s->from->at + (int64_t)channel * s->from->pitch;
  int64_t pixels = spa_pixels(s->from), i = 0;
  float sums[SUMS] = {0};
  double total = 0;
  for (; i + SUMS <= pixels; i += SUMS)
    for (int j = 0; j < SUMS; ++j) sums[j] += x[i + j];
  for (int j = 0; j < SUMS; ++j) total += sums[j];
  for (; i < pixels; ++i) total += x[i];
  s->to->at[(int64_t)channel * s->to->pitch] = (float)(total / (double)pixels);
  spa_clear_slack(s->to, (int64_t)channel);
}

Status* spa_image_mean(const Run* r, int from, int to) {
  Step s = {.from = &r->images[from], .to = &r->images[to]};
  return KernelContext_ParallelFor(r->context, mean_item, (size_t)r->node->region->images[to].channels, 0, &s);
}

static void combine_item(void* user, size_t channel) {
  const Step* s = user;
  const float* other = s->other ? s->other->at + (int64_t)channel * s->other->pitch : NULL;
  s->info->kernel(s->from->at + (int64_t)channel * s->from->pitch, other, s->to->at + (int64_t)channel * s->to->pitch,
                  (int32_t)s->registers, s->info->low, s->info->high);
}

Status* spa_image_combine(const Run* r, int combine, int from, int other, int to) {
  const Region* region = r->node->region;
  Step s = {.info = &region->combines[combine], .from = &r->images[from], .to = &r->images[to],
            .other = other < 0 ? NULL : &r->images[other]};
  if (other >= 0) {
    int scales = s.info->scales;
    CHECK(r->node, scales ? spa_pixels(s.other) == 1 : s.other->height == s.to->height && s.other->width == s.to->width,
          "%lld x %lld pixels are combined with %lld x %lld", (long long)s.to->height, (long long)s.to->width,
          (long long)s.other->height, (long long)s.other->width);
  }
  s.registers = blocks_of(spa_pixels(s.to), REGISTER);
  return KernelContext_ParallelFor(r->context, combine_item, (size_t)region->images[to].channels, 0, &s);
}

/* Pixel (y, x) of a channel is put where rows and columns `grow` apart begin. */
static void put(const Step* s, const float* x, float* y, int64_t row_step, int64_t column_step) {
  for (int64_t i = 0; i < s->from->height; ++i) {
    const float* row = x + i * s->from->width;
    float* to = y + i * row_step;
    if (column_step == 1)
      memcpy(to, row, sizeof(float) * (size_t)s->from->width);
    else
      for (int64_t j = 0; j < s->from->width; ++j) to[j * column_step] = row[j];
  }
}

static void every_item(void* user, size_t channel) {
  const Step* s = user;
  const float* x = s->from->at + (int64_t)channel * s->from->pitch;
  float* y = s->to->at + (int64_t)channel * s->to->pitch;
  int64_t width = s->to->width, step = s->stride[1];
  for (int64_t i = 0; i < s->to->height; ++i, y += width) {
    const float* row = x + i * s->stride[0] * s->from->width;
    if (step == 2)
      for (int64_t j = 0; j < width; ++j) y[j] = row[2 * j];
    else
      for (int64_t j = 0; j < width; ++j) y[j] = row[j * step];
  }
  spa_clear_slack(s->to, (int64_t)channel);
}

Status* spa_image_every(const Run* r, int from, int to) {
  const ImageInfo* info = &r->node->region->images[to];
  Step s = {.from = &r->images[from], .to = &r->images[to], .stride = info->window->stride};
  return KernelContext_ParallelFor(r->context, every_item, (size_t)info->channels, 0, &s);
}

static void repeat_item(void* user, size_t channel) {
  const Step* s = user;
  const float* x = s->from->at + (int64_t)channel * s->from->pitch;
  float* y = s->to->at + (int64_t)channel * s->to->pitch;
  int64_t width = s->to->width, down = s->grow[0], right = s->grow[1];
  for (int64_t i = 0; i < s->from->height; ++i) {
    const float* row = x + i * s->from->width;
    float* first = y + i * down * width;
    if (right == 2)
      for (int64_t j = 0; j < s->from->width; ++j) first[2 * j] = first[2 * j + 1] = row[j];
    else
      for (int64_t j = 0; j < width; ++j) first[j] = row[j / right];
    for (int64_t copy = 1; copy < down; ++copy) memcpy(first + copy * width, first, sizeof(float) * (size_t)width);
  }
  spa_clear_slack(s->to, (int64_t)channel);
}

Status* spa_image_repeat(const Run* r, int from, int to) {
  const ImageInfo* info = &r->node->region->images[to];
  Step s = {.from = &r->images[from], .to = &r->images[to], .grow = info->grow};
  return KernelContext_ParallelFor(r->context, repeat_item, (size_t)info->channels, 0, &s);
}

static void unfold_item(void* user, size_t channel) {
  const Step* s = user;
  float* y = s->to->at + (int64_t)channel * s->to->pitch;
  for (int64_t i = 0; i < s->grow[0]; ++i)
    for (int64_t j = 0; j < s->grow[1]; ++j)
      put(s, s->from->at + ((i * s->grow[1] + j) * s->channels + (int64_t)channel) * s->from->pitch,
          y + i * s->to->width + j, s->grow[0] * s->to->width, s->grow[1]);
  spa_clear_slack(s->to, (int64_t)channel);
}

Status* spa_image_unfold(const Run* r, int from, int to) {
  const ImageInfo* info = &r->node->region->images[to];
  Step s = {.from = &r->images[from], .to = &r->images[to], .grow = info->grow, .channels = info->channels};
  return KernelContext_ParallelFor(r->context, unfold_item, (size_t)info->channels, 0, &s);
}
