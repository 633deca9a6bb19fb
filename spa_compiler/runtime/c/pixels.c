/* The steps that see a pixel at a time: products, and the ways in and out. */
#include <string.h>

#include "region.h"

enum { FEW_WEIGHTS = 128 << 10 };    /* bytes that stay in L2 beside a tile */
enum { STAYS = 1 << 20, LINE = 16 }; /* bytes of an image that is still there when it is read; floats of a cache line */

void spa_clear_slack(const Image* image, int64_t channel) {
  int64_t pixels = image->held * image->width;
  memset(image->at + channel * image->pitch + pixels, 0,
         sizeof(float) * (size_t)(blocks_of(pixels, REGISTER) * REGISTER - pixels));
}

typedef struct {
  const float* from;
  float* to;
  int64_t pixels, from_pitch, to_pitch;
  const Image* cleared; /* the image that is written, if it has slack */
} Copy;

static void copy_item(void* user, size_t channel) {
  const Copy* c = user;
  memcpy(c->to + (int64_t)channel * c->to_pitch, c->from + (int64_t)channel * c->from_pitch,
         sizeof(float) * (size_t)c->pixels);
  if (c->cleared) spa_clear_slack(c->cleared, (int64_t)channel);
}

Status* spa_image_in(const Run* r, int to) {
  const ImageInfo* info = &r->node->region->images[to];
  const Image* image = &r->images[to];
  Copy c = {r->input[info->source], image->at, spa_pixels(image), spa_pixels(image), image->pitch, image};
  if (!image->in_scratch) return NULL;
  return KernelContext_ParallelFor(r->context, copy_item, (size_t)info->channels, 0, &c);
}

Status* spa_image_out(const Run* r, int from, int output) {
  const Image* image = &r->images[from];
  Copy c = {image->at, r->output[output], spa_pixels(image), image->pitch, spa_pixels(image), NULL};
  return KernelContext_ParallelFor(r->context, copy_item, (size_t)r->node->region->images[from].channels, 0, &c);
}

typedef struct {
  const Run* run;
  int products; /* 1 or 2, added up */
  struct {
    const LinearInfo* linear;
    const void* const* arrays;
    const Image* from;
    const int32_t* offsets;
  } product[2];
  const Image *residual, *to;
  int64_t vectors, tiles, chunks;
  int whole; /* an item is a tile with all of its chunks */
} Linear;

/* The next tile of an image that does not stay in L2: a few lines of each channel, all on pages of their own, are more
 * than hardware prefetches. A line that is written is read before that, too. */
static void fetch(const Image* image, const Image* to, int64_t channels, int64_t first, int written) {
  const float* place = image->at + spa_first_pixel(to, image) + first;
  if (image->held * image->width * channels * (int64_t)sizeof(float) <= STAYS) return;
  for (int64_t c = 0; c < channels; ++c, place += image->pitch)
    for (int64_t line = 0; line < MAX_LANES; line += LINE)
      if (written)
        __builtin_prefetch(place + line, 1, 2);
      else
        __builtin_prefetch(place + line, 0, 2);
}

/* One chunk of output channels of one tile of pixels. */
static void linear_chunk(const Linear* s, int64_t tile, int64_t chunk) {
  const LinearInfo* w = s->product[0].linear;
  int64_t vector = tile * s->vectors / s->tiles, registers = (tile + 1) * s->vectors / s->tiles - vector;
  int64_t first = vector * REGISTER, lanes = registers * REGISTER, row = chunk * w->chunk;
  int64_t kept = s->to->in_scratch ? lanes : least(s->to->rows * s->to->width - first, lanes);
  int64_t features = least(w->n - row, w->chunk);
  int whole = 1; /* kernels compute whole groups of rows, and whole registers */
  for (int p = 0; p < s->products; ++p) whole &= features % s->product[p].linear->rows == 0;
  int direct = whole && kept == lanes && (s->to->in_scratch || s->to->pitch % SPA_SETS != 0);
  _Alignas(64) float accumulators[MAX_CHUNK * MAX_LANES], residual[MAX_CHUNK * MAX_LANES];
  float* place = s->to->at + row * s->to->pitch + spa_first_pixel(s->to, s->to) + first;
  Rows out = direct ? (Rows){place, s->to->pitch} : (Rows){accumulators, lanes}, base = out;
  if (s->residual) {
    base = (Rows){s->residual->at + row * s->residual->pitch + spa_first_pixel(s->to, s->residual) + first,
                  s->residual->pitch};
    for (int64_t f = 0; !whole && f < features; ++f)
      memcpy(residual + f * lanes, base.at + f * base.pitch, sizeof(float) * (size_t)lanes);
    if (!whole) base = (Rows){residual, lanes};
  }
  for (int p = 0; p < s->products; ++p)
    spa_add_product(s->product[p].linear, s->product[p].arrays, (int)registers - 1,
                    (Rows){s->product[p].from->at + spa_first_pixel(s->to, s->product[p].from) + first,
                           s->product[p].from->pitch},
                    s->product[p].offsets, chunk,
                    p ? ACCUMULATE : s->residual ? START_RESIDUAL : START_BIAS, p == s->products - 1, base, out);
  if (direct) return;
  for (int64_t f = 0; f < features; ++f)
    memcpy(place + f * s->to->pitch, accumulators + f * lanes, sizeof(float) * (size_t)kept);
}

/* Few weights stay in L2 while a tile meets all of them; of many, one chunk meets all tiles. */
static void linear_item(void* user, size_t item) {
  const Linear* s = user;
  if (!s->whole) {
    linear_chunk(s, (int64_t)item % s->tiles, (int64_t)item / s->tiles);
    return;
  }
  int64_t next = ((int64_t)item + 1) * s->vectors / s->tiles * REGISTER;
  if ((int64_t)item + 1 < s->tiles) {
    for (int p = 0; p < s->products; ++p) fetch(s->product[p].from, s->to, s->product[p].linear->k, next, 0);
    if (s->residual) fetch(s->residual, s->to, s->product[0].linear->n, next, 0);
    if (s->residual == NULL || s->residual->at != s->to->at) fetch(s->to, s->to, s->product[0].linear->n, next, 1);
  }
  for (int64_t chunk = 0; chunk < s->chunks; ++chunk) linear_chunk(s, (int64_t)item, chunk);
}

Status* spa_image_linear(const Run* r, int linear, int from, int second, int second_from, int residual, int to) {
  const Node* node = r->node;
  const int linears[2] = {linear, second}, sources[2] = {from, second_from};
  Linear s = {.run = r, .to = &r->images[to], .residual = residual < 0 ? NULL : &r->images[residual]};
  int64_t bytes = 0;
  for (int p = 0; p < 2 && linears[p] >= 0; ++p) {
    const LinearInfo* w = &node->region->linears[linears[p]];
    const Image* source = &r->images[sources[p]];
    int32_t* offsets = r->offsets + p * r->table;
    CHECK(node, source->height == s.to->height && source->width == s.to->width,
          "products of %lld x %lld and %lld x %lld pixels are added", (long long)s.to->height, (long long)s.to->width,
          (long long)source->height, (long long)source->width);
    for (int64_t c = 0; c < w->k; ++c) offsets[c] = (int32_t)((w->pitched ? 1 : c) * source->pitch);
    s.product[s.products].linear = w;
    s.product[s.products].arrays = node->linears[linears[p]];
    s.product[s.products].from = source;
    s.product[s.products++].offsets = offsets;
    const int32_t* indptr = node->linears[linears[p]][INDPTR];
    bytes += indptr[blocks_of(w->n, w->rows) * blocks_of(w->k, w->k_block)] * entry_bytes(w);
  }
  CHECK(node, !s.residual || (s.residual->height == s.to->height && s.residual->width == s.to->width),
        "a residual of %lld x %lld pixels is added to %lld x %lld", (long long)(s.residual ? s.residual->height : 0),
        (long long)(s.residual ? s.residual->width : 0), (long long)s.to->height, (long long)s.to->width);
  s.vectors = blocks_of(s.to->rows * s.to->width, REGISTER);
  s.tiles = blocks_of(s.vectors, MAX_LANES / REGISTER);
  s.chunks = blocks_of(s.product[0].linear->n, s.product[0].linear->chunk);
  s.whole = bytes <= FEW_WEIGHTS;
  return KernelContext_ParallelFor(r->context, linear_item, (size_t)(s.whole ? s.tiles : s.tiles * s.chunks), 0, &s);
}
