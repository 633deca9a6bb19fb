/* Depthwise convolution and the largest value of a window: an item is a channel, band by band through a buffer that stays in L1.
 * spa_compiler/kernels/depthwise.py has its layout. */
#include "region.h"

enum { STEP = 8, BLOCK = 8 };               /* floats that shift copies; rows that a kernel computes at once, at most */
enum { BUFFER = 16 << 10, ROOM = 8 << 10 }; /* floats: of the buffer; of it that a band fills if a smaller one can */
enum { READ_BEHIND = 31 };                  /* floats: of pad */

#define LOWEST -3.4028234663852886e38f

typedef struct {
  const Run* run;
  const DepthwiseInfo* info;
  const void* const* arrays; /* NULL: no taps */
  float fill;                /* what padding holds */
  const Image *from, *to;
  int64_t height, width; /* of a band */
} Step;

/* One more than is read: a copy ends with zeros up to where a next row would begin. */
static int64_t rows_for(const WindowInfo* w, int64_t height) {
  return (blocks_of(height, BLOCK) * BLOCK - 1) * w->stride[0] + (w->size[0] - 1) * w->dilation[0] + 2;
}

static int64_t pitch_for(const WindowInfo* w, int64_t width) {
  int64_t seen = most(width, REGISTER) + (w->size[1] - 1) * w->dilation[1] / w->stride[1];
  return blocks_of(seen, STEP) * STEP;
}

/* Rows `top` .. `top` + `rows` of the padded image as the buffer holds them, column `left` of the outputs first. */
static void fill(const Step* s, int64_t channel, int64_t top, int64_t rows, int64_t left, float* buffer, int64_t plane,
                 int64_t pitch) {
  const WindowInfo* w = s->info->window;
  const float* x = s->from->at + channel * s->from->pitch;
  int64_t step = w->stride[1], width = s->from->width, low = least(most(top, 0), top + rows);
  int64_t high = most(least(top + rows, s->from->height), low);
  int slack = s->from->in_scratch || high + blocks_of(READ_BEHIND, width) <= s->from->base + s->from->held;
  if (step <= 2 && left == 0 && w->pads[1] + width <= pitch * step && slack) {
    s->run->node->region->pad(x + (low - s->from->base) * width, buffer, (int32_t)(low - top), (int32_t)(high - low),
                              (int32_t)(top + rows - high), (int32_t)width, (int32_t)w->pads[1], (int32_t)plane,
                              (int32_t)pitch, (int32_t)step, s->fill);
    return;
  }
  for (int64_t phase = 0; phase < step; ++phase) {
    int64_t seen = left * step + phase - w->pads[1];
    int64_t begin = least(seen < 0 ? blocks_of(-seen, step) : 0, pitch);
    int64_t end = most(begin, least(seen < width ? blocks_of(width - seen, step) : 0, pitch));
    s->run->node->region->shift(x, buffer + phase * plane, (int32_t)(top - s->from->base), (int32_t)rows, 1,
                                (int32_t)s->from->held, (int32_t)width, (int32_t)pitch, (int32_t)begin, (int32_t)end,
                                (int32_t)seen, (int32_t)step, (int32_t)(channel * s->from->pitch),
                                (int32_t)((s->info->channels - channel) * s->from->pitch), s->fill);
  }
}

/* Rows and columns first .. first + height and left .. left + width of the outputs. */
static void band(const Step* s, int64_t channel, int64_t first, int64_t height, int64_t left, int64_t width) {
  const WindowInfo* w = s->info->window;
  const float* taps = s->arrays ? (const float*)s->arrays[TAPS] + channel * w->size[0] * w->size[1] : NULL;
  const float* bias = s->arrays ? (const float*)s->arrays[DEPTHWISE_BIAS] + channel : NULL;
  int64_t rows = rows_for(w, height), pitch = pitch_for(w, width);
  int64_t seen = (height - 1) * w->stride[0] + (w->size[0] - 1) * w->dilation[0] + 1;
  _Alignas(64) float buffer[BUFFER];
  fill(s, channel, first * w->stride[0] - w->pads[0], seen, left, buffer, rows * pitch, pitch);
  s->info->kernel(buffer, taps, bias,
                  s->to->at + channel * s->to->pitch + (first - s->to->base) * s->to->width + left, (int32_t)height,
                  (int32_t)width, (int32_t)(rows * pitch), (int32_t)pitch, (int32_t)s->to->width, s->info->low,
                  s->info->high);
}

static void item(void* user, size_t channel) {
  const Step* s = user;
  const int64_t end = s->to->first + s->to->rows;
  for (int64_t first = s->to->first; first < end; first += s->height)
    for (int64_t left = 0; left < s->to->width; left += s->width) {
      /* less than a register would write past its columns into rows that are done: it begins early instead */
      int64_t begin = left && s->to->width - left < REGISTER ? s->to->width - REGISTER : left;
      band(s, (int64_t)channel, first, least(end - first, s->height), begin, least(s->to->width - begin, s->width));
    }
  spa_clear_slack(s->to, (int64_t)channel);
}

static Status* each_channel(const Run* r, const DepthwiseInfo* info, const void* const* arrays, int from, int to) {
  const WindowInfo* w = info->window;
  Step s = {.run = r, .info = info, .arrays = arrays, .fill = arrays ? 0.0f : LOWEST, .from = &r->images[from],
            .to = &r->images[to], .height = BLOCK, .width = r->images[to].width};
  int64_t lowest = rows_for(w, BLOCK) * w->stride[1];
  while (s.width > REGISTER && lowest * pitch_for(w, s.width) > ROOM)
    s.width = blocks_of(s.width / 2, REGISTER) * REGISTER;
  while (s.height < s.to->rows && rows_for(w, s.height + BLOCK) * w->stride[1] * pitch_for(w, s.width) <= ROOM)
    s.height += BLOCK;
  return KernelContext_ParallelFor(r->context, item, (size_t)info->channels, 0, &s);
}

Status* spa_image_depthwise(const Run* r, int depthwise, int from, int to) {
  return each_channel(r, &r->node->region->depthwise[depthwise], r->node->depthwise[depthwise], from, to);
}

Status* spa_image_largest(const Run* r, int largest, int from, int to) {
  return each_channel(r, &r->node->region->largest[largest], NULL, from, to);
}
