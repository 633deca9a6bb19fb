/* A step that sees a window of an image: planes are laid out for a band of outputs, then the product runs on tiles of them.
 * spa_compiler/kernels/window.py has the layout. Bands are as large as planes that stay in L2 while all outputs read them,
 * but never smaller than a tile. */
#include <string.h>

#include "region.h"

enum { PITCH_STEP = 8, RUN = 3 };
enum { MAX_RUNS = MAX_LANES / PITCH_STEP + 1 };
enum { BAND_FLOATS = 192 << 10 }; /* 768 KiB of planes at most, unless a single tile needs more */

typedef struct {
  int64_t height, width, pitch; /* rows and columns of outputs; floats of a row of the planes */
  int64_t rows, floats; /* rows of each copy of a channel; of all planes, with what the last tile reads behind them */
} Layout;

typedef struct { /* some rows of the outputs of one image, or some columns of one row */
  const Run* run;
  const WindowInfo* window;
  const LinearInfo* linear;
  const void* const* arrays;
  const Image *from, *residual, *to;
  Layout layout;
  int64_t first, height, left, width, tiles; /* the first row, how many; the first column, how many; their tiles */
  float* planes;
  const int32_t* offsets;
} Band;

static int64_t rows_of(const WindowInfo* w, int64_t height) {
  return blocks_of((height - 1) * w->stride[0] + (w->size[0] - 1) * w->dilation[0] + 1, w->stride[0]) * w->stride[0];
}

/* The most rows of a band that the bound on its planes allows. */
static int64_t highest_band(const WindowInfo* w, int64_t channels, int64_t width) {
  int64_t pitch = blocks_of(width, PITCH_STEP) * PITCH_STEP;
  int64_t room = BAND_FLOATS / (channels * w->size[1] * pitch) - (w->size[0] - 1) * w->dilation[0];
  return most(room / w->stride[0], blocks_of(MAX_LANES, pitch));
}

/* Bands of equal height, as few as there can be; a row that is too long by itself is cut, too. */
static Layout layout_of(const WindowInfo* w, int64_t channels, const Image* to, int64_t rows) {
  Layout l = {.width = to->width, .pitch = blocks_of(to->width, PITCH_STEP) * PITCH_STEP};
  int64_t copies = channels * w->size[1];
  l.height = blocks_of(rows, blocks_of(rows, highest_band(w, channels, to->width)));
  l.rows = rows_of(w, l.height);
  if (l.height == 1 && l.pitch > BAND_FLOATS / copies / l.rows) {
    l.width = least(most(BAND_FLOATS / copies / l.rows / MAX_LANES, 1) * MAX_LANES, to->width);
    l.pitch = blocks_of(l.width, PITCH_STEP) * PITCH_STEP;
  }
  /* more than 32-bit offsets reach is refused, so it need not be exact */
  l.floats = l.rows > INT32_MAX / (copies * l.pitch) ? INT64_MAX / 2 : copies * l.rows * l.pitch + MAX_LANES;
  return l;
}

int64_t spa_window_outputs(const WindowInfo* w, int axis, int64_t size) {
  int64_t room = size + w->pads[axis] + w->pads[axis + 2] - (w->size[axis] - 1) * w->dilation[axis] - 1;
  return room < 0 ? 0 : room / w->stride[axis] + 1;
}

int64_t spa_window_scratch(const WindowInfo* w, int64_t channels, const Image* to, int64_t rows) {
  return layout_of(w, channels, to, least(rows, highest_band(w, channels, to->width))).floats;
}

/* Every copy of one channel. */
static void shift_item(void* user, size_t channel) {
  const Band* b = user;
  const WindowInfo* w = b->window;
  int64_t plane = b->layout.rows * b->layout.pitch, step = w->stride[1];
  int64_t channels = b->linear->k / (w->size[0] * w->size[1]), before = (int64_t)channel * b->from->pitch;
  for (int64_t x = 0; x < w->size[1]; ++x) {
    int64_t left = x * w->dilation[1] - w->pads[1] + b->left * step;
    int64_t low = least(left < 0 ? blocks_of(-left, step) : 0, b->width);
    int64_t high = most(low, least(left < b->from->width ? blocks_of(b->from->width - left, step) : 0, b->width));
    b->run->node->region->shift(
        b->from->at + before, b->planes + (x * channels + (int64_t)channel) * plane,
        (int32_t)(b->first * w->stride[0] - w->pads[0] - b->from->base), (int32_t)(b->layout.rows / w->stride[0]),
        (int32_t)w->stride[0], (int32_t)b->from->held, (int32_t)b->from->width, (int32_t)b->layout.pitch,
        (int32_t)low, (int32_t)high, (int32_t)left, (int32_t)step, (int32_t)before,
        (int32_t)(channels * b->from->pitch - before), 0.0f);
  }
}

/* What of a tile is kept: lane, length and place in the plane of each run. */
static int32_t runs_of(const Band* b, int64_t first, int64_t lanes, int32_t runs[RUN * MAX_RUNS]) {
  int64_t pitch = b->layout.pitch, width = b->to->width;
  int32_t count = 0;
  if (pitch == width) { /* nothing lies between two rows, and none is cut */
    runs[0] = 0;
    runs[1] = (int32_t)least(b->height * width - first, lanes);
    runs[2] = (int32_t)((b->first - b->to->base) * width + first);
    return 1;
  }
  for (int64_t y = first / pitch; y < b->height && y * pitch < first + lanes; ++y) {
    int64_t low = most(first, y * pitch), high = least(first + lanes, y * pitch + b->width);
    if (low >= high) continue;
    int32_t* run = runs + RUN * count++;
    run[0] = (int32_t)(low - first);
    run[1] = (int32_t)(high - low);
    run[2] = (int32_t)((b->first - b->to->base + y) * width + b->left + low - y * pitch);
  }
  return count;
}

/* A feature of the residual, brought into the order of a tile. */
static void gather(const float* plane, float* tile, const int32_t* runs, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    memcpy(tile + runs[RUN * i], plane + runs[RUN * i + 2], sizeof(float) * (size_t)runs[RUN * i + 1]);
}

/* One chunk of output features of one tile. Items go chunk by chunk: its weights stay in L2 for all tiles. */
static void product_item(void* user, size_t item) {
  const Band* b = user;
  const LinearInfo* w = b->linear;
  int64_t tile = (int64_t)item % b->tiles, chunk = (int64_t)item / b->tiles, first = tile * MAX_LANES;
  int64_t lanes = least(blocks_of(b->height * b->layout.pitch - first, REGISTER) * REGISTER, MAX_LANES);
  int64_t row = chunk * w->chunk, features = least(w->n - row, w->chunk);
  int32_t runs[RUN * MAX_RUNS], count = runs_of(b, first, lanes, runs);
  _Alignas(64) float accumulators[MAX_CHUNK * MAX_LANES], residual[MAX_CHUNK * MAX_LANES];
  for (int64_t f = 0; b->residual && f < features; ++f)
    gather(b->residual->at + (row + f) * b->residual->pitch + (b->to->base - b->residual->base) * b->to->width,
           residual + f * lanes, runs, count);
  spa_add_product(w, b->arrays, (int)(lanes / REGISTER) - 1, (Rows){b->planes + first, 0}, b->offsets, chunk,
                  b->residual ? START_RESIDUAL : START_BIAS, 1, (Rows){residual, lanes}, (Rows){accumulators, lanes});
  for (int64_t f = 0; f < features; ++f)
    b->run->node->region->crop(accumulators + f * lanes, b->to->at + (row + f) * b->to->pitch, runs, count);
}

static void clear_item(void* user, size_t channel) {
  const Band* b = user;
  spa_clear_slack(b->to, (int64_t)channel);
}

static void write_offsets(const Band* b, int32_t* offsets) {
  const WindowInfo* w = b->window;
  const Layout* l = &b->layout;
  int64_t channels = b->linear->k / (w->size[0] * w->size[1]);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < w->size[0]; ++y)
      for (int64_t x = 0; x < w->size[1]; ++x) {
        int64_t row = y * w->dilation[0];
        int64_t place = row % w->stride[0] * (l->rows / w->stride[0]) + row / w->stride[0];
        *offsets++ = (int32_t)(((x * channels + c) * l->rows + place) * l->pitch);
      }
}

Status* spa_image_window(const Run* r, int linear, int from, int residual, int to) {
  const ImageInfo *info = &r->node->region->images[to], *source = &r->node->region->images[from];
  Band b = {.run = r, .window = info->window, .linear = &r->node->region->linears[linear],
            .arrays = r->node->linears[linear], .from = &r->images[from], .to = &r->images[to],
            .residual = residual < 0 ? NULL : &r->images[residual], .planes = r->scratch, .offsets = r->offsets};
  CHECK(r->node, !b.residual || (b.residual->height == b.to->height && b.residual->width == b.to->width),
        "a residual of %lld x %lld pixels is added to %lld x %lld", (long long)(b.residual ? b.residual->height : 0),
        (long long)(b.residual ? b.residual->width : 0), (long long)b.to->height, (long long)b.to->width);
  const int64_t end = b.to->first + b.to->rows;
  b.layout = layout_of(b.window, source->channels, b.to, b.to->rows);
  write_offsets(&b, r->offsets);
  for (b.first = b.to->first; b.first < end; b.first += b.layout.height) {
    b.height = least(end - b.first, b.layout.height);
    b.tiles = blocks_of(b.height * b.layout.pitch, MAX_LANES);
    for (b.left = 0; b.left < b.to->width; b.left += b.layout.width) {
      b.width = least(b.to->width - b.left, b.layout.width);
      TRY(KernelContext_ParallelFor(r->context, shift_item, (size_t)source->channels, 0, &b));
      TRY(KernelContext_ParallelFor(r->context, product_item, (size_t)(b.tiles * blocks_of(b.linear->n, b.linear->chunk)),
                                    0, &b));
    }
  }
  return b.to->in_scratch && b.to->held * b.to->width % REGISTER
             ? KernelContext_ParallelFor(r->context, clear_item, (size_t)info->channels, 0, &b)
             : NULL;
}
