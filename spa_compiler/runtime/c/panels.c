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

/* Masks follow the inputs: [batch or 1, heads or 1, tokens or 1, tokens]. A region's attention cores have equal heads. */
static Status* bind_masks(Run* r) {
  const Node* node = r->node;
  for (int i = 0; i < node->region->masks; ++i) {
    const void* value;
    int64_t dims[MAX_RANK], heads = node->region->attentions[0].heads;
    const int64_t wanted[4] = {r->sequences, heads, r->tokens, r->tokens};
    size_t rank;
    char text[160];
    TRY(KernelContext_GetInput(r->context, (size_t)(node->region->inputs + i), &value));
    TRY(spa_shape_of(value, dims, MAX_RANK, &rank));
    int fits = rank == 4 && dims[3] == r->tokens;
    for (int d = 0; fits && d < 3; ++d) fits = dims[d] == 1 || dims[d] == wanted[d];
    CHECK(node, fits, "mask %d must be [%lld or 1,%lld or 1,%lld or 1,%lld], its shape is %s", i, (long long)wanted[0],
          (long long)heads, (long long)wanted[2], (long long)wanted[3], spa_show(text, dims, rank));
    TRY(GetTensorMutableData(value, &r->mask[i]));
    r->mask_stride[i][0] = dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3];
    r->mask_stride[i][1] = dims[1] == 1 ? 0 : dims[2] * dims[3];
    r->mask_stride[i][2] = dims[2] == 1 ? 0 : dims[3];
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
  if (r.sequences * r.tokens == 0) return NULL;
  CHECK(node, r.tokens <= INT32_MAX / widest, "%lld tokens are too many for 32-bit offsets", (long long)r.tokens);

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
    TRY(spa_set_shape(context, i, dims, names, rank));
  }
  return NULL;
}
