/* Calls of a region on panels: what its inputs are, how they are cut into tiles, and the shapes of its outputs. */
#include <string.h>

#include "region.h"

enum { PANEL_BYTES = 1 << 20, LEAST_TILES = 4 }; /* of a band: half of a core's L2; enough tiles for a few threads */

static const int lane_counts[LANE_COUNTS] = {1, 4, 8, 16, 32, 48, 64};

/* Reads the inputs, which must agree in all but their features; sets sequences and tokens. */
static Status* bind_inputs(Run* r, int64_t* dims, size_t* rank) {
  const Node* node = r->node;
  const Region* region = node->region;
  char text[160], other[160];
  for (int i = 0; i < region->inputs; ++i) {
    const void* value;
    int64_t own[MAX_RANK];
    size_t own_rank;
    TRY(KernelContext_GetInput(r->context, (size_t)i, &value));
    TRY(spa_shape_of(value, own, MAX_RANK, &own_rank));
    CHECK(node, !region->whole_sequences || own_rank == 3,
          "input %d must be [batch, tokens, features], it has %zu dimensions", i, own_rank);
    CHECK(node, own_rank >= 1 && own_rank <= MAX_RANK, "input %d must have 1 to %d dimensions, it has %zu", i,
          MAX_RANK, own_rank);
    size_t axis = own_rank - 1;
    CHECK(node, own[axis] == region->input_features[i], "input %d must have %lld features on axis %zu, its shape is %s", i,
          (long long)region->input_features[i], axis, spa_show(text, own, own_rank));
    if (i == 0) {
      *rank = own_rank;
      memcpy(dims, own, sizeof own);
    }
    int same = own_rank == *rank;
    for (size_t d = 0; same && d < own_rank; ++d) same = d == axis || own[d] == dims[d];
    CHECK(node, same, "inputs 0 and %d must agree in all but their features, their shapes are %s and %s", i,
          spa_show(text, dims, *rank), spa_show(other, own, own_rank));
    TRY(GetTensorMutableData(value, &r->input[i]));
  }
  r->sequences = r->tokens = 1;
  for (size_t d = 0; d + 1 < *rank; ++d)
    if (region->whole_sequences && d == 0) r->sequences = dims[d];
    else r->tokens *= dims[d];
  return NULL;
}

/* Reads an input's shape into four axes, with ones before those that it has. */
static Status* bind_aligned(Run* r, size_t input, const char* what, int number, int64_t dims[4], const float** data) {
  const void* value;
  int64_t own[MAX_RANK];
  size_t rank;
  char text[160];
  TRY(KernelContext_GetInput(r->context, input, &value));
  TRY(spa_shape_of(value, own, MAX_RANK, &rank));
  CHECK(r->node, rank >= 2 && rank <= 4, "%s %d must have 2 to 4 dimensions, its shape is %s", what, number,
        spa_show(text, own, rank));
  for (size_t d = 0; d < 4; ++d) dims[d] = d + rank < 4 ? 1 : own[d + rank - 4];
  return GetTensorMutableData(value, data);
}

/* Masks follow the inputs; the attention cores that read them say what shape they must have. */
static Status* bind_masks(Run* r) {
  const Region* region = r->node->region;
  for (int i = 0; i < region->masks; ++i)
    TRY(bind_aligned(r, (size_t)(region->inputs + i), "mask", i, r->mask_dims[i], &r->mask[i]));
  return NULL;
}

/* Tables follow the masks: [batch or 1, 1, tokens, features]. */
static Status* bind_tables(Run* r) {
  const Region* region = r->node->region;
  for (int i = 0; i < region->tables; ++i) {
    int64_t dims[4], features = region->table_features[i];
    char text[160];
    TRY(bind_aligned(r, (size_t)(region->inputs + region->masks + i), "table", i, dims, &r->rotary[i]));
    int fits = dims[3] == features && dims[2] == r->tokens && dims[1] == 1 && (dims[0] == 1 || dims[0] == r->sequences);
    CHECK(r->node, fits, "table %d must be [%lld or 1,1,%lld,%lld], its shape is %s", i, (long long)r->sequences,
          (long long)r->tokens, (long long)features, spa_show(text, dims, 4));
    r->rotary_stride[i] = dims[0] == 1 ? 0 : r->tokens * features;
  }
  return NULL;
}

/* Caches follow the tables, keys and values in turns: [batch, heads, past, depth]. They are outputs, too, after all
 * others, with the new tokens behind the past ones. */
static Status* bind_caches(Run* r) {
  const Region* region = r->node->region;
  for (int i = 0; i < region->cache_count; ++i) {
    const void* value;
    void* out;
    const CacheInfo* c = &region->caches[i];
    int64_t dims[MAX_RANK];
    size_t rank;
    char text[160];
    TRY(KernelContext_GetInput(r->context, (size_t)(region->inputs + region->masks + region->tables + i), &value));
    TRY(spa_shape_of(value, dims, MAX_RANK, &rank));
    CHECK(r->node, rank == 4 && dims[0] == r->sequences && dims[1] == c->heads && dims[3] == c->depth,
          "cache %d must be [%lld,%lld,past,%lld], its shape is %s", i, (long long)r->sequences, (long long)c->heads,
          (long long)c->depth, spa_show(text, dims, rank));
    CHECK(r->node, i % 2 == 0 || dims[2] == r->past_tokens[i - 1],
          "caches %d and %d must have the same tokens, not %lld and %lld", i - 1, i, (long long)r->past_tokens[i - 1],
          (long long)dims[2]);
    CHECK(r->node, dims[2] <= INT32_MAX / c->depth - r->tokens, "%lld past tokens are too many for 32-bit offsets",
          (long long)dims[2]);
    TRY(GetTensorMutableData(value, &r->past[i]));
    r->past_tokens[i] = dims[2];
    dims[2] += r->tokens;
    TRY(KernelContext_GetOutput(r->context, (size_t)(region->outputs + i), dims, rank, &out));
    TRY(GetTensorMutableData(out, &r->present[i]));
    if (r->tokens == 0 && r->sequences) /* nothing runs, and nothing is put behind */
      memcpy(r->present[i], r->past[i], sizeof(float) * (size_t)(dims[0] * dims[1] * dims[2] * dims[3]));
  }
  return NULL;
}

/* Tiles to compute at a time. Where the weights are small beside the panels, as in convolutions, reading them again for
 * every band costs less than panels that do not stay in L2. */
static int64_t band_of(const Run* r, int64_t tiles) {
  int64_t each = r->node->region->scratch_rows * r->lanes * (int64_t)sizeof(float);
  if (each * tiles <= PANEL_BYTES || r->node->weight_bytes > PANEL_BYTES / 4) return tiles;
  int64_t band = most(PANEL_BYTES / each, LEAST_TILES);
  int64_t unit = r->node->region->whole_sequences ? r->tiles_per_sequence : 1;
  return least(blocks_of(band, unit) * unit, tiles);
}

Status* spa_compute_panels(const Node* node, void* context) {
  const Region* region = node->region;
  Run r = {.node = node, .context = context};
  int64_t dims[MAX_RANK];
  size_t rank = 0;
  TRY(bind_inputs(&r, dims, &rank));
  TRY(bind_masks(&r));
  int64_t widest = 1;
  for (int i = 0; i < region->outputs; ++i) {
    void* value;
    dims[rank - 1] = region->output_features[i];
    widest = most(widest, dims[rank - 1]);
    TRY(KernelContext_GetOutput(context, (size_t)i, dims, rank, &value));
    TRY(GetTensorMutableData(value, &r.output[i]));
  }
  for (int i = 0; i < region->inputs; ++i) widest = most(widest, region->input_features[i]);
  CHECK(node, r.tokens <= INT32_MAX / widest, "%lld tokens are too many for 32-bit offsets", (long long)r.tokens);
  TRY(bind_tables(&r));
  TRY(bind_caches(&r));
  if (r.sequences * r.tokens == 0) return NULL;

  r.tiles_per_sequence = (r.tokens + MAX_LANES - 1) / MAX_LANES;
  int64_t each = (r.tokens + r.tiles_per_sequence - 1) / r.tiles_per_sequence;
  while (lane_counts[r.lane_index] < each) ++r.lane_index;
  r.lanes = lane_counts[r.lane_index];
  r.tiles_per_sequence = (r.tokens + r.lanes - 1) / r.lanes;
  int64_t tiles = r.sequences * r.tiles_per_sequence, band = band_of(&r, tiles);

  size_t bytes = sizeof(float) * (size_t)(region->scratch_rows * band * r.lanes) + 64;
  void* block = node->allocator->Alloc(node->allocator, bytes);
  if (!block) return spa_refuse(node, CODE_FAIL, "no memory for %zu bytes of scratch", bytes);
  r.scratch = (float*)(((uintptr_t)block + 63) / 64 * 64);
  Status* status = NULL;
  for (; !status && r.first_tile < tiles; r.first_tile += band) {
    r.tiles = least(tiles - r.first_tile, band);
    status = region->run(&r);
  }
  node->allocator->Free(node->allocator, block);
  return status;
}

/* A cache's new shape is the old one with more tokens. */
static Status* infer_caches(const Region* region, void* context, int64_t tokens) {
  for (int i = 0; i < region->cache_count; ++i) {
    void* x;
    int64_t dims[MAX_RANK];
    const char* names[MAX_RANK];
    size_t rank;
    TRY(ShapeInfer_GetInputTypeShape(context, (size_t)(region->inputs + region->masks + region->tables + i), &x));
    TRY(GetDimensionsCount(x, &rank));
    if (rank != 4) continue;
    TRY(GetDimensions(x, dims, rank));
    TRY(GetSymbolicDimensions(x, names, rank));
    dims[2] = dims[2] < 0 || tokens < 0 ? -1 : dims[2] + tokens;
    names[2] = "";
    TRY(spa_set_shape(context, ELEMENT_FLOAT, region->outputs + i, dims, names, rank));
  }
  return NULL;
}

Status* spa_infer_panels(const Region* region, void* context) {
  void* x;
  int64_t dims[MAX_RANK];
  const char* names[MAX_RANK];
  size_t rank;
  TRY(ShapeInfer_GetInputTypeShape(context, 0, &x)); /* borrowed */
  TRY(GetDimensionsCount(x, &rank));
  if (rank < 1 || rank > MAX_RANK) return NULL; /* unknown shape: leave the outputs unknown */
  TRY(GetDimensions(x, dims, rank));
  TRY(GetSymbolicDimensions(x, names, rank));
  names[rank - 1] = "";
  for (int i = 0; i < region->outputs; ++i) {
    dims[rank - 1] = region->output_features[i];
    TRY(spa_set_shape(context, ELEMENT_FLOAT, i, dims, names, rank));
  }
  return infer_caches(region, context, rank == 3 ? dims[1] : -1);
}
