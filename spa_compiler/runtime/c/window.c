/* Convolution with a window: planes are laid out for a band of outputs, then the product runs on tiles of them.
 * spa_compiler/kernels/window.py has the layout. Bands are as large as planes that stay in L2 while all outputs read them,
 * but never smaller than a tile. */
#include "region.h"

enum { PITCH_STEP = 8, REGISTER = 16, RUN = 3 };
enum { MAX_RUNS = MAX_LANES / PITCH_STEP + 1 };
enum { BAND_FLOATS = 192 << 10 }; /* 768 KiB of planes at most, unless a single tile needs more */

typedef struct {
  int64_t height, width, pitch; /* rows and columns of outputs; floats of a row of the planes */
  int64_t rows, floats; /* rows of each copy of a channel; of all planes, with what the last tile reads behind them */
} Layout;

typedef struct { /* some rows of the outputs of one image, or some columns of one row */
  const Run* run;
  Layout layout;
  int64_t first, height, left, width, tiles; /* the first row, how many; the first column, how many; their tiles */
  const float* x;
  float *y, *planes;
  const int32_t* offsets;
} Band;

static int64_t rows_of(const WindowInfo* w, int64_t height) {
  return blocks_of((height - 1) * w->stride[0] + (w->size[0] - 1) * w->dilation[0] + 1, w->stride[0]) * w->stride[0];
}

/* Bands of equal height, as few as the bound on their planes allows; a row that is too long by itself is cut, too. */
static Layout layout_of(const Run* r) {
  const WindowInfo* w = r->node->region->window;
  Layout l = {.width = r->out_width, .pitch = blocks_of(r->out_width, PITCH_STEP) * PITCH_STEP};
  int64_t copies = w->channels * w->size[1];
  int64_t room = BAND_FLOATS / (copies * l.pitch) - (w->size[0] - 1) * w->dilation[0];
  int64_t highest = most(room / w->stride[0], blocks_of(MAX_LANES, l.pitch));
  l.height = blocks_of(r->out_height, blocks_of(r->out_height, highest));
  l.rows = rows_of(w, l.height);
  if (l.height == 1 && l.pitch > BAND_FLOATS / copies / l.rows) {
    l.width = least(most(BAND_FLOATS / copies / l.rows / MAX_LANES, 1) * MAX_LANES, r->out_width);
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

int64_t spa_window_scratch(const Run* r) {
  return layout_of(r).floats + blocks_of(r->node->region->linears[0].k, REGISTER) * REGISTER;
}

/* Every copy of one channel. */
static void shift_item(void* user, size_t channel) {
  const Band* b = user;
  const Run* r = b->run;
  const WindowInfo* w = r->node->region->window;
  int64_t plane = b->layout.rows * b->layout.pitch, step = w->stride[1];
  for (int64_t x = 0; x < w->size[1]; ++x) {
    int64_t left = x * w->dilation[1] - w->pads[1] + b->left * step;
    int64_t low = least(left < 0 ? blocks_of(-left, step) : 0, b->width);
    int64_t high = most(low, least(left < r->width ? blocks_of(r->width - left, step) : 0, b->width));
    w->shift(b->x + (int64_t)channel * r->height * r->width, b->planes + (x * w->channels + (int64_t)channel) * plane,
             (int32_t)(b->first * w->stride[0] - w->pads[0]), (int32_t)(b->layout.rows / w->stride[0]),
             (int32_t)w->stride[0], (int32_t)r->height, (int32_t)r->width, (int32_t)b->layout.pitch, (int32_t)low,
             (int32_t)high, (int32_t)left, (int32_t)step);
  }
}

/* What of a tile is kept: lane, length and place in the plane of each run. */
static int32_t runs_of(const Band* b, int64_t first, int64_t lanes, int32_t runs[RUN * MAX_RUNS]) {
  int64_t pitch = b->layout.pitch, width = b->run->out_width;
  int32_t count = 0;
  if (pitch == width) { /* nothing lies between two rows, and none is cut */
    runs[0] = 0;
    runs[1] = (int32_t)least(b->height * width - first, lanes);
    runs[2] = (int32_t)(b->first * width + first);
    return 1;
  }
  for (int64_t y = first / pitch; y < b->height && y * pitch < first + lanes; ++y) {
    int64_t low = most(first, y * pitch), high = least(first + lanes, y * pitch + b->width);
    if (low >= high) continue;
    int32_t* run = runs + RUN * count++;
    run[0] = (int32_t)(low - first);
    run[1] = (int32_t)(high - low);
    run[2] = (int32_t)((b->first + y) * width + b->left + low - y * pitch);
  }
  return count;
}

/* One chunk of output features of one tile. Items go chunk by chunk: its weights stay in L2 for all tiles. */
static void product_item(void* user, size_t item) {
  const Band* b = user;
  const Run* r = b->run;
  const LinearInfo* w = &r->node->region->linears[0];
  int64_t tile = (int64_t)item % b->tiles, chunk = (int64_t)item / b->tiles, first = tile * MAX_LANES;
  int64_t lanes = least(blocks_of(b->height * b->layout.pitch - first, REGISTER) * REGISTER, MAX_LANES);
  int64_t features = least(w->n - chunk * w->chunk, w->chunk), plane = r->out_height * r->out_width;
  int32_t runs[RUN * MAX_RUNS], count = runs_of(b, first, lanes, runs);
  _Alignas(64) float accumulators[MAX_CHUNK * MAX_LANES];
  spa_add_product(w, r->node->linears[0], (int)(lanes / REGISTER) - 1, (Rows){b->planes + first, 0}, b->offsets, chunk,
                  START_BIAS, 1, (Rows){NULL, 0}, (Rows){accumulators, lanes});
  for (int64_t f = 0; f < features; ++f)
    r->node->region->window->crop(accumulators + f * lanes, b->y + (chunk * w->chunk + f) * plane, runs, count);
}

static void write_offsets(const Run* r, const Layout* l, int32_t* offsets) {
  const WindowInfo* w = r->node->region->window;
  for (int64_t c = 0; c < w->channels; ++c)
    for (int64_t y = 0; y < w->size[0]; ++y)
      for (int64_t x = 0; x < w->size[1]; ++x) {
        int64_t row = y * w->dilation[0];
        int64_t place = row % w->stride[0] * (l->rows / w->stride[0]) + row / w->stride[0];
        *offsets++ = (int32_t)(((x * w->channels + c) * l->rows + place) * l->pitch);
      }
}

Status* spa_window(const Run* r) {
  const LinearInfo* w = &r->node->region->linears[0];
  const int64_t channels = r->node->region->window->channels;
  Band b = {.run = r, .layout = layout_of(r), .planes = r->scratch};
  int32_t* offsets = (int32_t*)(void*)(r->scratch + b.layout.floats);
  write_offsets(r, &b.layout, offsets);
  b.offsets = offsets;
  for (int64_t image = 0; image < r->sequences; ++image) {
    b.x = r->input[0] + image * channels * r->height * r->width;
    b.y = r->output[0] + image * w->n * r->out_height * r->out_width;
    for (b.first = 0; b.first < r->out_height; b.first += b.layout.height) {
      b.height = least(r->out_height - b.first, b.layout.height);
      b.tiles = blocks_of(b.height * b.layout.pitch, MAX_LANES);
      for (b.left = 0; b.left < r->out_width; b.left += b.layout.width) {
        b.width = least(r->out_width - b.left, b.layout.width);
        TRY(KernelContext_ParallelFor(r->context, shift_item, (size_t)channels, 0, &b));
        TRY(KernelContext_ParallelFor(r->context, product_item, (size_t)(b.tiles * blocks_of(w->n, w->chunk)), 0, &b));
      }
    }
  }
  return NULL;
}
