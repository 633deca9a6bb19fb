/* The steps of a region on panels: each is one ParallelFor on ONNX Runtime's own threads. No two items write one cache
 * line. */
#include "region.h"

enum { FEATURE_BLOCK = 256 }; /* features of one pack or unpack item */

enum { FIRST = 1, LAST = 2 }; /* bits of an attention kernel's `part` */
static const float LOWEST = -1e30f; /* a mask value that means never */

typedef struct { /* W x */
  const LinearInfo* linear;
  const void* const* arrays;
  float* from;
} Product;

typedef struct {
  const Run* run;
  const NormInfo* norm;
  const void* const* arrays;
  const float* from;
  float *residual, *factor, *to;
  int64_t features;
  const AttentionInfo* attention;
  const float *k, *v, *mask;
  const int64_t* mask_stride;
  int edge; /* the input or output of the region; < 0: a panel */
  int products; /* of a linear step: 1 or 2, added up */
  Product product[2];
} Step;

static float* panel_at(const Run* r, int64_t place) { return r->scratch + place * r->tiles * r->lanes; }

/* Tiles are counted from the band's first one; a band of attention begins with a sequence. */
static int64_t sequence_of(const Run* r, int64_t tile) { return (r->first_tile + tile) / r->tiles_per_sequence; }

static int64_t token_of(const Run* r, int64_t tile) {
  return (r->first_tile + tile) % r->tiles_per_sequence * r->lanes;
}

static int64_t tokens_in(const Run* r, int64_t tile) { return least(r->tokens - token_of(r, tile), r->lanes); }

/* Where feature `first` of a tile's first token lies in a tensor outside, and the stride that pack and unpack need. */
static int64_t outside(const Run* r, int64_t tile, int64_t features, int64_t first, int32_t* stride) {
  int64_t sequence = sequence_of(r, tile), token = token_of(r, tile);
  *stride = (int32_t)features;
  return (sequence * r->tokens + token) * features + first;
}

static void pack_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  int64_t tile = (int64_t)item % r->tiles, first = (int64_t)item / r->tiles * FEATURE_BLOCK;
  int32_t stride;
  int64_t at = outside(r, tile, s->features, first, &stride);
  r->node->region->pack[r->lane_index](s->from + at, s->to + (tile * spa_rows(s->features) + first) * r->lanes,
                                       (int32_t)tokens_in(r, tile), (int32_t)least(s->features - first, FEATURE_BLOCK),
                                       stride);
}

static void unpack_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  int64_t tile = (int64_t)item % r->tiles, first = (int64_t)item / r->tiles * FEATURE_BLOCK;
  int32_t stride;
  int64_t at = outside(r, tile, s->features, first, &stride);
  r->node->region->unpack[r->lane_index](s->from + (tile * spa_rows(s->features) + first) * r->lanes, s->to + at,
                                         (int32_t)tokens_in(r, tile), (int32_t)least(s->features - first, FEATURE_BLOCK),
                                         stride);
}

static void norm_item(void* user, size_t tile) {
  const Step* s = user;
  int64_t at = (int64_t)tile * spa_rows(s->features) * s->run->lanes;
  s->norm->kernels[s->run->lane_index](s->from + at, s->arrays[0], s->arrays[1], s->to + at, (int32_t)s->features,
                                       s->norm->epsilon);
}

void spa_add_product(const LinearInfo* w, const void* const* arrays, int kernel, Rows from, const int32_t* offsets,
                     int64_t chunk, int start, int last, Rows base, Rows out) {
  int64_t blocks = blocks_of(w->k, w->k_block), per_chunk = w->chunk / w->rows;
  int64_t groups = least(blocks_of(w->n, w->rows) - chunk * per_chunk, per_chunk);
  const int32_t *indptr = arrays[INDPTR], *order = arrays[ORDER];
  const float* bias = arrays[BIAS];
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t group = chunk * per_chunk * blocks + b * groups, column = b * w->k_block;
    w->kernels[kernel](offsets ? from.at : from.at + column * from.pitch, offsets ? offsets + column : NULL,
                       indptr + group, order + group * own_columns(w), arrays[COLUMNS], arrays[VALUES], bias + chunk * w->chunk, base.at,
                       out.at, (int32_t)groups, b ? ACCUMULATE : start, last && b == blocks - 1, (int32_t)base.pitch,
                       (int32_t)out.pitch, w->low, w->high);
  }
}

/* The same for a product of a step; `base` and `out` are parts of panels. */
static void add_product(const Run* r, const Product* p, int64_t tile, int64_t chunk, int start, int last, float* base,
                        float* out) {
  spa_add_product(p->linear, p->arrays, r->lane_index,
                  (Rows){p->from + tile * spa_rows(p->linear->k) * r->lanes, r->lanes}, NULL, chunk, start, last,
                  (Rows){base, r->lanes}, (Rows){out, r->lanes});
}

/* One chunk of output rows of one tile. Items go chunk by chunk, so that a chunk's weights stay in L2 for all tiles. */
static void linear_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  const LinearInfo* w = s->product[0].linear;
  int64_t tile = (int64_t)item % r->tiles, chunk = (int64_t)item / r->tiles, row = chunk * w->chunk;
  int64_t in_panel = (tile * spa_rows(w->n) + row) * r->lanes;
  _Alignas(64) float accumulators[MAX_CHUNK * MAX_LANES];
  float* out = s->edge < 0 ? s->to + in_panel : accumulators;
  add_product(r, &s->product[0], tile, chunk, s->residual ? START_RESIDUAL : START_BIAS, s->products == 1,
              s->residual ? s->residual + in_panel : out, out);
  if (s->products == 2) add_product(r, &s->product[1], tile, chunk, ACCUMULATE, 1, out, out);
  if (s->factor)
    r->node->region->gate(out, s->factor + in_panel, (int32_t)(least(w->n - row, w->chunk) * r->lanes));
  if (s->edge >= 0) {
    int32_t stride;
    int64_t at = outside(r, tile, w->n, row, &stride);
    r->node->region->unpack[r->lane_index](accumulators, s->to + at, (int32_t)tokens_in(r, tile),
                                           (int32_t)least(w->n - row, w->chunk), stride);
  }
}

/* The mask of one tile of queries and one of keys as [lanes, lanes], a row for each key; rows past the last key say
 * never. */
static void mask_tile(const Step* s, int64_t head, int64_t tile, int64_t key_tile, float* mask) {
  const Run* r = s->run;
  int64_t lanes = r->lanes, keys = tokens_in(r, key_tile), first_key = token_of(r, key_tile);
  if (s->mask) {
    const float* from = s->mask + sequence_of(r, tile) * s->mask_stride[0] + head * s->mask_stride[1] + first_key;
    if (s->mask_stride[2])
      r->node->region->pack[r->lane_index](from + token_of(r, tile) * s->mask_stride[2], mask,
                                           (int32_t)tokens_in(r, tile), (int32_t)keys, (int32_t)s->mask_stride[2]);
    else
      for (int64_t key = 0; key < keys; ++key)
        for (int64_t i = 0; i < lanes; ++i) mask[key * lanes + i] = from[key];
  } else {
    for (int64_t i = 0; i < keys * lanes; ++i) mask[i] = 0.0f;
  }
  for (int64_t i = keys * lanes; i < lanes * lanes; ++i) mask[i] = LOWEST;
}

/* One head of one tile of queries: over all key tiles of its sequence. */
static void attention_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  const AttentionInfo* a = s->attention;
  int64_t lanes = r->lanes, tile = (int64_t)item % r->tiles, head = (int64_t)item / r->tiles;
  int64_t first = tile / r->tiles_per_sequence * r->tiles_per_sequence, stride = spa_rows(s->features) * lanes;
  int64_t in_tile = head * a->depth * lanes;
  _Alignas(64) float scores[MAX_LANES * MAX_LANES], mask[MAX_LANES * MAX_LANES], state[2 * MAX_LANES];
  for (int64_t t = 0; t < r->tiles_per_sequence; ++t) {
    int64_t at = (first + t) * stride + in_tile;
    mask_tile(s, head, tile, first + t, mask);
    a->kernels[r->lane_index](s->from + tile * stride + in_tile, s->k + at, s->v + at, mask, scores, state,
                              s->to + tile * stride + in_tile, (int32_t)a->depth, (int32_t)tokens_in(r, first + t),
                              (t == 0 ? FIRST : 0) | (t + 1 == r->tiles_per_sequence ? LAST : 0), a->scale);
  }
}

static Status* in_parallel(void (*function)(void*, size_t), int64_t items, Step* s) {
  return KernelContext_ParallelFor(s->run->context, function, (size_t)items, 0, s);
}

Status* spa_pack(const Run* r, int input, int64_t to) {
  int64_t features = r->node->region->input_features[input];
  Step s = {.run = r, .from = r->input[input], .to = panel_at(r, to), .features = features};
  return in_parallel(pack_item, r->tiles * blocks_of(features, FEATURE_BLOCK), &s);
}

Status* spa_unpack(const Run* r, int output, int64_t from) {
  int64_t features = r->node->region->output_features[output];
  Step s = {.run = r, .from = panel_at(r, from), .to = r->output[output], .features = features};
  return in_parallel(unpack_item, r->tiles * blocks_of(features, FEATURE_BLOCK), &s);
}

static Product product(const Run* r, int linear, int64_t from) {
  return (Product){&r->node->region->linears[linear], r->node->linears[linear], panel_at(r, from)};
}

/* `second` < 0: one product alone */
static Status* linear_step(const Run* r, int first, int64_t from, int second, int64_t second_from, int64_t residual,
                           int64_t factor, float* to, int edge) {
  Step s = {.run = r, .residual = residual < 0 ? NULL : panel_at(r, residual), .to = to, .edge = edge, .products = 1};
  s.factor = factor < 0 ? NULL : panel_at(r, factor);
  s.product[0] = product(r, first, from);
  if (second >= 0) s.product[s.products++] = product(r, second, second_from);
  const LinearInfo* w = s.product[0].linear;
  return in_parallel(linear_item, r->tiles * blocks_of(w->n, w->chunk), &s);
}

Status* spa_linear(const Run* r, int linear, int64_t from, int64_t residual, int64_t to) {
  return linear_step(r, linear, from, -1, 0, residual, -1, panel_at(r, to), -1);
}

Status* spa_linear_out(const Run* r, int linear, int64_t from, int64_t residual, int output) {
  return linear_step(r, linear, from, -1, 0, residual, -1, r->output[output], output);
}

Status* spa_linear_times(const Run* r, int linear, int64_t from, int64_t residual, int64_t factor, int64_t to) {
  return linear_step(r, linear, from, -1, 0, residual, factor, panel_at(r, to), -1);
}

Status* spa_sum(const Run* r, int first, int64_t from, int second, int64_t second_from, int64_t residual, int64_t to) {
  return linear_step(r, first, from, second, second_from, residual, -1, panel_at(r, to), -1);
}

Status* spa_sum_out(const Run* r, int first, int64_t from, int second, int64_t second_from, int64_t residual,
                    int output) {
  return linear_step(r, first, from, second, second_from, residual, -1, r->output[output], output);
}

Status* spa_sum_times(const Run* r, int first, int64_t from, int second, int64_t second_from, int64_t residual,
                      int64_t factor, int64_t to) {
  return linear_step(r, first, from, second, second_from, residual, factor, panel_at(r, to), -1);
}

Status* spa_attention(const Run* r, int attention, int64_t q, int64_t k, int64_t v, int mask, int64_t to) {
  const AttentionInfo* info = &r->node->region->attentions[attention];
  Step s = {.run = r, .attention = info, .features = info->heads * info->depth, .from = panel_at(r, q),
            .k = panel_at(r, k), .v = panel_at(r, v), .to = panel_at(r, to),
            .mask = mask < 0 ? NULL : r->mask[mask], .mask_stride = mask < 0 ? NULL : r->mask_stride[mask]};
  return in_parallel(attention_item, r->tiles * info->heads, &s);
}

Status* spa_norm(const Run* r, int norm, int64_t from, int64_t to) {
  const NormInfo* info = &r->node->region->norms[norm];
  Step s = {.run = r, .norm = info, .arrays = r->node->norms[norm], .from = panel_at(r, from), .to = panel_at(r, to),
            .features = info->features};
  return in_parallel(norm_item, r->tiles, &s);
}
