/* The steps of a region on panels: each is one ParallelFor on ONNX Runtime's own threads. No two items write one cache
 * line. */
#include <string.h>

#include "region.h"

enum { FEATURE_BLOCK = 256 }; /* features of one pack or unpack item */

enum { LINE = 64, AHEAD = 8192 }; /* bytes: of a cache line; that kernels fetch ahead of values */

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
  int64_t mask_stride[3]; /* of the first three axes; 0 where the size is 1 */
  int cache;              /* of the keys; the values have the next */
  const float *cos, *sin;
  int64_t depth, stride; /* of heads; of a table, from sequence to sequence */
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

static void table_item(void* user, size_t tile) {
  const Step* s = user;
  const Run* r = s->run;
  int64_t at = sequence_of(r, (int64_t)tile) * s->stride + token_of(r, (int64_t)tile) * s->features;
  r->node->region->pack[r->lane_index](s->from + at, s->to + (int64_t)tile * spa_rows(s->features) * r->lanes,
                                       (int32_t)tokens_in(r, (int64_t)tile), (int32_t)s->features,
                                       (int32_t)s->features);
}

static void rotate_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  int64_t tile = (int64_t)item % r->tiles, head = (int64_t)item / r->tiles, lanes = r->lanes;
  int64_t at = (tile * spa_rows(s->features) + head * s->depth) * lanes, angle = tile * spa_rows(s->depth) * lanes;
  r->node->region->rotate(s->from + at, s->cos + angle, s->sin + angle, s->to + at, (int32_t)(s->depth / 2 * lanes));
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
    int64_t known = offsets && !w->pitched; /* the places of all columns */
    w->kernels[kernel](known ? from.at : from.at + column * from.pitch, known ? offsets + column : offsets,
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

static void fetch(const void* from, int64_t bytes) { /* may go past the end of an array: nothing is read */
  for (uintptr_t at = (uintptr_t)from, end = at + (uintptr_t)bytes; at < end; at += LINE)
    __builtin_prefetch((const void*)at);
}

void spa_fetch_chunk(const LinearInfo* w, const void* const* arrays, int64_t chunk) {
  int64_t blocks = blocks_of(w->k, w->k_block), per_chunk = w->chunk / w->rows, first = chunk * per_chunk * blocks;
  int64_t groups = least(blocks_of(w->n, w->rows) - chunk * per_chunk, per_chunk), own = own_columns(w);
  fetch((const int32_t*)arrays[INDPTR] + first, groups * blocks * (int64_t)sizeof(int32_t));
  fetch((const int32_t*)arrays[ORDER] + first * own, groups * blocks * own * (int64_t)sizeof(int32_t));
  fetch((const float*)arrays[BIAS] + chunk * w->chunk, groups * w->rows * (int64_t)sizeof(float));
  if (chunk == 0) {
    fetch(arrays[VALUES], AHEAD);
    fetch(arrays[COLUMNS], AHEAD / w->rows / (int64_t)(sizeof(float) / sizeof(uint16_t)));
  }
}

/* Fetches the chunk after `chunk`, which may be the next weight's first. Weights come from memory in every call. */
static void fetch_next(const Step* s, int64_t chunk) {
  const Node* node = s->run->node;
  const LinearInfo *w = s->product[0].linear, *next = w + s->products;
  if (chunk + 1 < blocks_of(w->n, w->chunk))
    spa_fetch_chunk(w, s->product[0].arrays, chunk + 1);
  else if (next < node->region->linears + node->region->linear_count)
    spa_fetch_chunk(next, node->linears[next - node->region->linears], 0);
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
  if (tile == r->tiles - 1) fetch_next(s, chunk);
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

/* The mask of one tile of queries and one of keys, a row for each key: of `lanes` floats, or of one where all queries see the
 * same. Rows past the last key say never. Returns the floats from row to row, 0 where all queries see the same. */
static int32_t mask_tile(const Step* s, int64_t head, int64_t tile, int64_t key_tile, float* mask) {
  const Run* r = s->run;
  int64_t keys = tokens_in(r, key_tile), row = s->mask ? s->mask_stride[2] : 0, width = row ? r->lanes : 1;
  const float* from = NULL;
  if (s->mask)
    from = s->mask + sequence_of(r, tile) * s->mask_stride[0] + head * s->mask_stride[1] + token_of(r, tile) * row +
           token_of(r, key_tile);
  if (row)
    r->node->region->pack[r->lane_index](from, mask, (int32_t)tokens_in(r, tile), (int32_t)keys, (int32_t)row);
  else
    for (int64_t key = 0; key < keys; ++key) mask[key] = from ? from[key] : 0.0f;
  for (int64_t i = keys * width; i < r->lanes * width; ++i) mask[i] = LOWEST;
  return row ? (int32_t)width : 0;
}

/* Whether a row of a mask shows a key of those from `first` to `end`. */
static int shows(const float* row, int64_t first, int64_t end) {
  for (int64_t key = first; key < end; ++key)
    if (!(row[key] <= LOWEST)) return 1;
  return 0;
}

/* Key tiles that a tile of queries needs: those at the end that its mask hides, as a causal one does, change nothing if
 * every query sees a key before them. */
static int64_t key_tiles(const Step* s, int64_t head, int64_t tile) {
  const Run* r = s->run;
  int64_t tiles = r->tiles_per_sequence, rows = s->mask_stride[2] ? tokens_in(r, tile) : 1;
  if (!s->mask) return tiles;
  const float* from = s->mask + sequence_of(r, tile) * s->mask_stride[0] + head * s->mask_stride[1] +
                      token_of(r, tile) * s->mask_stride[2];
  int64_t needed = tiles;
  for (int hidden = 1; needed > 1; --needed) {
    int64_t first = (needed - 1) * r->lanes;
    for (int64_t i = 0; hidden && i < rows; ++i)
      hidden = !shows(from + i * s->mask_stride[2], first, least(first + r->lanes, r->tokens));
    if (!hidden) break;
  }
  for (int64_t i = 0; needed < tiles && i < rows; ++i)
    if (!shows(from + i * s->mask_stride[2], 0, needed * r->lanes)) needed = tiles;
  return needed;
}

/* One head of one tile of queries: over the key tiles of its sequence. */
static void attention_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  const AttentionInfo* a = s->attention;
  int64_t lanes = r->lanes, tile = (int64_t)item % r->tiles, head = (int64_t)item / r->tiles;
  int64_t first = tile / r->tiles_per_sequence * r->tiles_per_sequence, needed = key_tiles(s, head, tile);
  int64_t query = (tile * spa_rows(s->features) + head * a->depth) * lanes;
  int64_t key = head / a->shared * a->depth * lanes, stride = spa_rows(s->features / a->shared) * lanes;
  _Alignas(64) float scores[MAX_LANES * MAX_LANES], mask[MAX_LANES * MAX_LANES], state[2 * MAX_LANES];
  for (int64_t t = 0; t < needed; ++t) {
    int64_t at = (first + t) * stride + key;
    int32_t mask_stride = mask_tile(s, head, tile, first + t, mask);
    a->kernels[r->lane_index](s->from + query, s->k + at, s->v + at, mask, scores, state, s->to + query,
                              (int32_t)a->depth, (int32_t)tokens_in(r, first + t), mask_stride,
                              (t == 0 ? FIRST : 0) | (t + 1 == needed ? LAST : 0), a->scale);
  }
}

/* The new tokens of one head of keys or values, behind the past ones of a sequence. */
static void append(const Step* s, const float* panel, int64_t first_tile, int64_t head, float* rows) {
  const Run* r = s->run;
  const AttentionInfo* a = s->attention;
  for (int64_t tile = first_tile; tile < first_tile + r->tiles_per_sequence; ++tile) {
    int64_t at = (tile * spa_rows(s->features / a->shared) + head * a->depth) * r->lanes;
    r->node->region->unpack[r->lane_index](panel + at, rows + token_of(r, tile) * a->depth,
                                           (int32_t)tokens_in(r, tile), (int32_t)a->depth, (int32_t)a->depth);
  }
}

/* The mask of one token and of `heads` heads for a tile of keys, a row of CACHE_KEYS for each head that has its own. */
static int32_t cached_mask(const Step* s, int64_t sequence, int64_t head, int64_t heads, int64_t token, int64_t first,
                           int64_t keys, float* mask) {
  int64_t rows = s->mask && s->mask_stride[1] ? heads : 1;
  for (int64_t i = 0; i < rows; ++i) {
    float* to = mask + i * CACHE_KEYS;
    const float* from = s->mask ? s->mask + sequence * s->mask_stride[0] + (head + i) * s->mask_stride[1] +
                                      token * s->mask_stride[2] + first
                                : NULL;
    for (int64_t key = 0; key < CACHE_KEYS; ++key) to[key] = key >= keys ? LOWEST : from ? from[key] : 0.0f;
  }
  return rows > 1 ? CACHE_KEYS : 0;
}

/* One head of keys and values of one sequence, with a cache: puts the new tokens behind the past ones, then one token
 * after the other meets them all. */
static void cached_item(void* user, size_t item) {
  const Step* s = user;
  const Run* r = s->run;
  const AttentionInfo* a = s->attention;
  int64_t key_heads = a->heads / a->shared, head = (int64_t)item % key_heads;
  int64_t first_tile = (int64_t)item / key_heads * r->tiles_per_sequence, sequence = sequence_of(r, first_tile);
  int64_t past = r->past_tokens[s->cache], keys = past + r->tokens, depth = a->depth, width = a->shared * depth;
  const float *past_k = r->past[s->cache] + (sequence * key_heads + head) * past * depth,
              *past_v = r->past[s->cache + 1] + (sequence * key_heads + head) * past * depth;
  float *k = r->present[s->cache] + (sequence * key_heads + head) * keys * depth,
        *v = r->present[s->cache + 1] + (sequence * key_heads + head) * keys * depth;
  _Alignas(64) float query[MAX_QUERY], out[MAX_QUERY], scores[MAX_SHARED * CACHE_KEYS], mask[MAX_SHARED * CACHE_KEYS];
  float state[2 * MAX_SHARED];
  append(s, s->k, first_tile, head, k + past * depth);
  append(s, s->v, first_tile, head, v + past * depth);
  for (int64_t token = 0; token < r->tokens; ++token) {
    int64_t lane = token % r->lanes, tile = first_tile + token / r->lanes;
    int64_t at = (tile * spa_rows(s->features) + head * width) * r->lanes;
    for (int64_t f = 0; f < width; ++f) query[f] = s->from[at + f * r->lanes + lane];
    for (int64_t first = 0; first < keys; first += CACHE_KEYS) {
      int64_t count = least(keys - first, CACHE_KEYS), old = least(most(past - first, 0), count);
      if (token == 0 && old) { /* just before they are read, tile by tile */
        memcpy(k + first * depth, past_k + first * depth, sizeof(float) * (size_t)(old * depth));
        memcpy(v + first * depth, past_v + first * depth, sizeof(float) * (size_t)(old * depth));
      }
      int32_t part = (first == 0 ? FIRST : 0) | (first + count == keys ? LAST : 0);
      for (int64_t i = 0; i < a->shared; i += a->at_once) {
        int32_t stride = cached_mask(s, sequence, head * a->shared + i, a->at_once, token, first, count, mask);
        a->cached(query + i * depth, k + first * depth, v + first * depth, mask, scores, state + 2 * i, out + i * depth,
                  (int32_t)count, stride, part, a->scale);
      }
    }
    int64_t end = token + 1 == r->tokens ? r->lanes : lane + 1; /* lanes past the last token hold copies of it */
    for (int64_t f = 0; f < width; ++f)
      for (int64_t i = lane; i < end; ++i) s->to[at + f * r->lanes + i] = out[f];
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

/* The step of an attention core over `keys` keys; refuses a mask of another shape. */
static Status* attention_step(const Run* r, int attention, int64_t q, int64_t k, int64_t v, int mask, int64_t keys,
                              int64_t to, Step* s) {
  const AttentionInfo* info = &r->node->region->attentions[attention];
  *s = (Step){.run = r, .attention = info, .features = info->heads * info->depth, .from = panel_at(r, q),
              .k = panel_at(r, k), .v = panel_at(r, v), .to = panel_at(r, to)};
  if (mask < 0) return NULL;
  const int64_t *dims = r->mask_dims[mask], wanted[3] = {r->sequences, info->heads, r->tokens};
  char text[160];
  int fits = dims[3] == keys;
  for (int d = 0; fits && d < 3; ++d) fits = dims[d] == 1 || dims[d] == wanted[d];
  CHECK(r->node, fits, "mask %d must be [%lld or 1,%lld or 1,%lld or 1,%lld], its shape is %s", mask,
        (long long)wanted[0], (long long)wanted[1], (long long)wanted[2], (long long)keys, spa_show(text, dims, 4));
  s->mask = r->mask[mask];
  s->mask_stride[0] = dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3];
  s->mask_stride[1] = dims[1] == 1 ? 0 : dims[2] * dims[3];
  s->mask_stride[2] = dims[2] == 1 ? 0 : dims[3];
  return NULL;
}

Status* spa_attention(const Run* r, int attention, int64_t q, int64_t k, int64_t v, int mask, int64_t to) {
  Step s;
  TRY(attention_step(r, attention, q, k, v, mask, r->tokens, to, &s));
  return in_parallel(attention_item, r->tiles * s.attention->heads, &s);
}

Status* spa_attention_cached(const Run* r, int attention, int64_t q, int64_t k, int64_t v, int mask, int cache,
                             int64_t to) {
  Step s;
  TRY(attention_step(r, attention, q, k, v, mask, r->past_tokens[cache] + r->tokens, to, &s));
  s.cache = cache;
  return in_parallel(cached_item, r->tiles / r->tiles_per_sequence * (s.attention->heads / s.attention->shared), &s);
}

Status* spa_table(const Run* r, int table, int64_t to) {
  Step s = {.run = r, .from = r->rotary[table], .to = panel_at(r, to), .stride = r->rotary_stride[table],
            .features = r->node->region->table_features[table]};
  return in_parallel(table_item, r->tiles, &s);
}

Status* spa_rotate(const Run* r, int64_t heads, int64_t depth, int64_t from, int64_t cos, int64_t sin, int64_t to) {
  Step s = {.run = r, .from = panel_at(r, from), .to = panel_at(r, to), .cos = panel_at(r, cos), .sin = panel_at(r, sin),
            .features = heads * depth, .depth = depth};
  return in_parallel(rotate_item, r->tiles * heads, &s);
}

Status* spa_norm(const Run* r, int norm, int64_t from, int64_t to) {
  const NormInfo* info = &r->node->region->norms[norm];
  Step s = {.run = r, .norm = info, .arrays = r->node->norms[norm], .from = panel_at(r, from), .to = panel_at(r, to),
            .features = info->features};
  return in_parallel(norm_item, r->tiles, &s);
}
