/* The life of a node: creation (everything that kernels index with is checked here, once), calls, shape inference. */
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "region.h"

enum { PANEL_BYTES = 1 << 20, LEAST_TILES = 4 }; /* of a band: half of a core's L2; enough tiles for a few threads */

static const int lane_counts[LANE_COUNTS] = {1, 4, 8, 16, 32, 48, 64};
static const int linear_types[LINEAR_ARRAYS] = {ELEMENT_INT32, ELEMENT_INT32, ELEMENT_UINT16, ELEMENT_FLOAT,
                                                ELEMENT_FLOAT};
static const char* const linear_names[LINEAR_ARRAYS] = {"indptr", "order", "columns", "values", "bias"};

/* "ai.spa::Region_1234 at site 'encoder/dense': ..." */
static Status* refuse(const Node* node, int code, const char* format, ...) {
  char message[768];
  int length = snprintf(message, sizeof message, "ai.spa::%s at site '%s': ", node->region->name, node->site);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + length, sizeof message - (size_t)length, format, arguments);
  va_end(arguments);
  return CreateStatus(code, message);
}
#define CHECK(node, condition, ...) \
  do {                              \
    if (!(condition)) return refuse(node, CODE_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)

static Status* shape_of(const void* value, int64_t* dims, size_t limit, size_t* rank) {
  void* info;
  TRY(GetTensorTypeAndShape(value, &info));
  Status* status = GetDimensionsCount(info, rank);
  if (!status && *rank <= limit) status = GetDimensions(info, dims, *rank);
  ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

static const char* show(char text[160], const int64_t* dims, size_t rank) {
  size_t at = (size_t)snprintf(text, 160, "[");
  for (size_t i = 0; i < rank && i < MAX_RANK; ++i)
    at += (size_t)snprintf(text + at, 160 - at, "%s%lld", i ? "," : "", (long long)dims[i]);
  snprintf(text + at, 160 - at, "]");
  return text;
}

/* ---- creation ---- */

static Status* initializer(const Node* node, const void* info, size_t index, const char* what, size_t rank,
                           int64_t* dims, const void** data) {
  int constant = 0;
  const void* value = NULL;
  size_t found;
  TRY(KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
  CHECK(node, constant && value, "input %zu (%s) must be an initializer", index, what);
  TRY(shape_of(value, dims, 2, &found));
  CHECK(node, found == rank, "%s must have %zu dimensions, it has %zu", what, rank, found);
  return GetTensorMutableData(value, data);
}

static Status* check_linear(const Node* node, int which, const int64_t size[LINEAR_ARRAYS]) {
  const LinearInfo* w = &node->region->linears[which];
  const int32_t *indptr = node->linears[which][INDPTR], *order = node->linears[which][ORDER];
  const uint16_t* columns = node->linears[which][COLUMNS];
  int64_t groups = (w->n + w->rows - 1) / w->rows, per_chunk = w->chunk / w->rows;
  int64_t blocks = (w->k + w->k_block - 1) / w->k_block, own = own_columns(w), entry = 0, entries = groups * blocks;
  CHECK(node, size[INDPTR] == entries + 1, "weight %d: indptr must have %lld elements, it has %lld", which,
        (long long)entries + 1, (long long)size[INDPTR]);
  CHECK(node, size[ORDER] == entries, "weight %d: order must have %lld elements, it has %lld", which,
        (long long)entries, (long long)size[ORDER]);
  CHECK(node, size[BIAS] == groups * w->rows, "weight %d: bias must have %lld elements, it has %lld", which,
        (long long)(groups * w->rows), (long long)size[BIAS]);
  CHECK(node, size[COLUMNS] == size[VALUES], "weight %d: %lld columns, but %lld rows of values", which,
        (long long)size[COLUMNS], (long long)size[VALUES]);
  CHECK(node, size[VALUES] < INT32_MAX / w->rows, "weight %d: too many values", which);
  CHECK(node, indptr[0] == 0 && indptr[entries] == size[VALUES], "weight %d: indptr must run from 0 to %lld", which,
        (long long)size[VALUES]);
  for (int64_t first = 0; first < groups; first += per_chunk)
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t in_tile = least(groups - first, per_chunk), width = least(w->k - b * w->k_block, w->k_block);
      char seen[MAX_CHUNK] = {0};
      for (int64_t g = 0; g < in_tile; ++g, ++entry) {
        for (int64_t i = entry * own; i < (entry + 1) * own; ++i) {
          CHECK(node, order[i] >= 0 && order[i] < in_tile * own && !seen[order[i]],
                "weight %d: order is not a permutation of %lld %s", which, (long long)(in_tile * own),
                own > 1 ? "rows" : "groups");
          seen[order[i]] = 1;
        }
        CHECK(node, indptr[entry] <= indptr[entry + 1] && indptr[entry + 1] <= size[VALUES],
              "weight %d: indptr must not decrease", which);
        for (int64_t j = indptr[entry] * own; j < indptr[entry + 1] * own; ++j)
          CHECK(node, columns[j] < width, "weight %d: column %d is out of range, the block has %lld", which, columns[j],
                (long long)width);
      }
    }
  return NULL;
}

/* The site is a node name of the source model, which may have any length: a long one is cut. */
static Status* read_site(Node* node, const void* info) {
  size_t length = 0;
  Status* status = KernelInfoGetAttribute_string(info, "site", NULL, &length);
  if (status) {
    char message[160];
    snprintf(message, sizeof message, "ai.spa::%s: the attribute 'site' is missing or not a string", node->region->name);
    ReleaseStatus(status);
    return CreateStatus(CODE_INVALID_ARGUMENT, message);
  }
  char* site = malloc(length);
  if (!site) return refuse(node, CODE_FAIL, "out of memory");
  status = KernelInfoGetAttribute_string(info, "site", site, &length);
  if (!status) {
    size_t cut = sizeof node->site - sizeof "...";
    while (length > sizeof node->site && (site[cut] & 0xc0) == 0x80) --cut; /* not inside a UTF-8 character */
    if (length > sizeof node->site) site[cut] = 0;
    snprintf(node->site, sizeof node->site, "%s%s", site, length > sizeof node->site ? "..." : "");
  }
  free(site);
  return status;
}

static Status* initialize(Node* node, const void* info) {
  const Region* region = node->region;
  size_t input = (size_t)(region->inputs + region->masks);
  int64_t dims[2], size[LINEAR_ARRAYS];
  TRY(read_site(node, info));
  node->linears = calloc((size_t)region->linear_count + 1, sizeof *node->linears);
  node->norms = calloc((size_t)region->norm_count + 1, sizeof *node->norms);
  if (!node->linears || !node->norms) return refuse(node, CODE_FAIL, "out of memory");
  for (int i = 0; i < region->linear_count; ++i) {
    for (int a = 0; a < LINEAR_ARRAYS; ++a) {
      const LinearInfo* w = &region->linears[i];
      int wide = a == VALUES || (w->interleaved && (a == ORDER || a == COLUMNS));
      TRY(initializer(node, info, input++, linear_names[a], wide ? 2 : 1, dims, &node->linears[i][a]));
      size[a] = dims[0];
      CHECK(node, !wide || dims[1] == w->rows, "weight %d: %s must be [entries, %lld]", i, linear_names[a],
            (long long)w->rows);
    }
    TRY(check_linear(node, i, size));
    node->weight_bytes += size[VALUES] * (int64_t)(sizeof(float) * (size_t)region->linears[i].rows +
                                                sizeof(uint16_t) * (size_t)own_columns(&region->linears[i]));
  }
  for (int i = 0; i < region->norm_count; ++i)
    for (int a = 0; a < NORM_ARRAYS; ++a) {
      TRY(initializer(node, info, input++, a ? "beta" : "gamma", 1, dims, &node->norms[i][a]));
      CHECK(node, dims[0] == region->norms[i].features, "norm %d: gamma and beta must have %lld elements, not %lld", i,
            (long long)region->norms[i].features, (long long)dims[0]);
    }
  return KernelInfoGetAllocator(info, 0 /* OrtMemTypeDefault */, &node->allocator);
}

void spa_destroy(void* kernel) {
  Node* node = kernel;
  if (!node) return;
  if (node->allocator) ReleaseAllocator(node->allocator);
  free(node->linears);
  free(node->norms);
  free(node);
}

Status* spa_create(const CustomOp* self, Api unused, const void* info, void** kernel) {
  (void)unused;
  Node* node = calloc(1, sizeof *node);
  *kernel = NULL;
  if (!node) return CreateStatus(CODE_FAIL, "ai.spa: out of memory");
  node->region = (const Region*)(const void*)self;
  Status* status = initialize(node, info);
  if (status) {
    spa_destroy(node);
    return status;
  }
  *kernel = node;
  return NULL;
}

/* ---- calls ---- */

static int feature_axis(const Region* region, size_t rank) {
  return region->layout == LAYOUT_PLANES ? 1 : (int)rank - 1;
}

/* Reads the inputs, which must agree in all but their features; sets sequences and tokens. */
static Status* bind_inputs(Run* r, int64_t* dims, size_t* rank) {
  const Node* node = r->node;
  const Region* region = node->region;
  const size_t least_rank = region->layout == LAYOUT_PLANES ? 3 : 1;
  char text[160], other[160];
  for (int i = 0; i < region->inputs; ++i) {
    const void* value;
    int64_t own[MAX_RANK];
    size_t own_rank;
    TRY(KernelContext_GetInput(r->context, (size_t)i, &value));
    TRY(shape_of(value, own, MAX_RANK, &own_rank));
    CHECK(node, !region->whole_sequences || own_rank == 3,
          "input %d must be [batch, tokens, features], it has %zu dimensions", i, own_rank);
    CHECK(node, own_rank >= least_rank && own_rank <= MAX_RANK, "input %d must have %zu to %d dimensions, it has %zu", i,
          least_rank, MAX_RANK, own_rank);
    int axis = feature_axis(region, own_rank);
    CHECK(node, own[axis] == region->input_features[i], "input %d must have %lld features on axis %d, its shape is %s", i,
          (long long)region->input_features[i], axis, show(text, own, own_rank));
    if (i == 0) {
      *rank = own_rank;
      memcpy(dims, own, sizeof own);
    }
    int same = own_rank == *rank;
    for (size_t d = 0; same && d < own_rank; ++d) same = (int)d == axis || own[d] == dims[d];
    CHECK(node, same, "inputs 0 and %d must agree in all but their features, their shapes are %s and %s", i,
          show(text, dims, *rank), show(other, own, own_rank));
    TRY(GetTensorMutableData(value, &r->input[i]));
  }
  r->sequences = r->tokens = 1;
  for (size_t d = 0; d < *rank; ++d)
    if ((int)d != feature_axis(region, *rank)) {
      if ((region->layout == LAYOUT_PLANES || region->whole_sequences) && d == 0) r->sequences = dims[d];
      else r->tokens *= dims[d];
    }
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
    TRY(shape_of(value, dims, MAX_RANK, &rank));
    int fits = rank == 4 && dims[3] == r->tokens;
    for (int d = 0; fits && d < 3; ++d) fits = dims[d] == 1 || dims[d] == wanted[d];
    CHECK(node, fits, "mask %d must be [%lld or 1,%lld or 1,%lld or 1,%lld], its shape is %s", i, (long long)wanted[0],
          (long long)heads, (long long)wanted[2], (long long)wanted[3], show(text, dims, rank));
    TRY(GetTensorMutableData(value, &r->mask[i]));
    r->mask_stride[i][0] = dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3];
    r->mask_stride[i][1] = dims[1] == 1 ? 0 : dims[2] * dims[3];
    r->mask_stride[i][2] = dims[2] == 1 ? 0 : dims[3];
  }
  return NULL;
}

/* Behind a window: reads the sizes of an image, and turns `dims` into those of the output. */
static Status* bind_window(Run* r, int64_t* dims, size_t rank) {
  const Node* node = r->node;
  const WindowInfo* w = node->region->window;
  char text[160];
  if (!w) return NULL;
  CHECK(node, (int64_t)rank == w->axes + 2, "the input must have %lld dimensions, its shape is %s",
        (long long)w->axes + 2, show(text, dims, rank));
  r->height = w->axes == 2 ? dims[2] : 1;
  r->width = dims[rank - 1];
  r->out_height = spa_window_outputs(w, 0, r->height);
  r->out_width = spa_window_outputs(w, 1, r->width);
  /* ONNX Runtime takes an image without pixels whose padding alone is as large as the window; no kernel here does. */
  CHECK(node, r->height > 0 && r->width > 0 && r->out_height > 0 && r->out_width > 0,
        "the input is smaller than the window, its shape is %s", show(text, dims, rank));
  CHECK(node, r->height <= INT32_MAX / r->width && r->out_height <= INT32_MAX / (r->out_width + 8) &&
                  spa_window_scratch(r) <= INT32_MAX,
        "an image has too many pixels for 32-bit offsets, the input's shape is %s", show(text, dims, rank));
  if (w->axes == 2) dims[2] = r->out_height;
  dims[rank - 1] = r->out_width;
  return NULL;
}

/* Tiles to compute at a time. Where the weights are small beside the panels, as in convolutions, reading them again for
 * every band costs less than panels that do not stay in L2. */
static int64_t band_of(const Run* r, int64_t tiles) {
  int64_t each = r->node->region->scratch_rows * r->lanes * (int64_t)sizeof(float);
  if (r->node->region->window || each * tiles <= PANEL_BYTES || r->node->weight_bytes > PANEL_BYTES / 4) return tiles;
  int64_t band = most(PANEL_BYTES / each, LEAST_TILES);
  int64_t unit = r->node->region->whole_sequences ? r->tiles_per_sequence : 1;
  return least(blocks_of(band, unit) * unit, tiles);
}

Status* spa_compute(void* kernel, void* context) {
  const Node* node = kernel;
  const Region* region = node->region;
  Run r = {.node = node, .context = context};
  int64_t dims[MAX_RANK];
  size_t rank = 0;
  TRY(bind_inputs(&r, dims, &rank));
  TRY(bind_masks(&r));
  TRY(bind_window(&r, dims, rank));
  int axis = feature_axis(region, rank);
  int64_t widest = 1;
  for (int i = 0; i < region->outputs; ++i) {
    void* value;
    dims[axis] = region->output_features[i];
    if (dims[axis] > widest) widest = dims[axis];
    TRY(KernelContext_GetOutput(context, (size_t)i, dims, rank, &value));
    TRY(GetTensorMutableData(value, &r.output[i]));
  }
  for (int i = 0; i < region->inputs; ++i)
    if (region->input_features[i] > widest) widest = region->input_features[i];
  if (r.sequences * r.tokens == 0) return NULL;
  CHECK(node, r.tokens <= INT32_MAX / widest, "%lld tokens are too many for 32-bit offsets", (long long)r.tokens);

  r.tiles_per_sequence = (r.tokens + MAX_LANES - 1) / MAX_LANES;
  int64_t each = (r.tokens + r.tiles_per_sequence - 1) / r.tiles_per_sequence;
  while (lane_counts[r.lane_index] < each) ++r.lane_index;
  r.lanes = lane_counts[r.lane_index];
  r.tiles_per_sequence = (r.tokens + r.lanes - 1) / r.lanes;
  int64_t tiles = r.sequences * r.tiles_per_sequence, band = band_of(&r, tiles);

  int64_t floats = region->window ? spa_window_scratch(&r) : region->scratch_rows * band * r.lanes;
  size_t bytes = sizeof(float) * (size_t)floats + 64;
  void* block = node->allocator->Alloc(node->allocator, bytes);
  if (!block) return refuse(node, CODE_FAIL, "no memory for %zu bytes of scratch", bytes);
  r.scratch = (float*)(((uintptr_t)block + 63) / 64 * 64);
  Status* status = NULL;
  for (; !status && r.first_tile < tiles; r.first_tile += band) {
    r.tiles = least(tiles - r.first_tile, band);
    status = region->run(&r);
  }
  node->allocator->Free(node->allocator, block);
  return status;
}

/* ---- what ONNX Runtime asks about an op ---- */

Status* spa_infer_shape(const CustomOp* self, void* context) {
  const Region* region = (const Region*)(const void*)self;
  void *x, *y;
  int64_t dims[MAX_RANK];
  const char* names[MAX_RANK];
  size_t rank;
  TRY(ShapeInfer_GetInputTypeShape(context, 0, &x)); /* borrowed */
  TRY(GetDimensionsCount(x, &rank));
  if (rank < 1 || rank > MAX_RANK || (region->layout == LAYOUT_PLANES && rank < 3))
    return NULL; /* unknown shape: leave the outputs unknown */
  TRY(GetDimensions(x, dims, rank));
  TRY(GetSymbolicDimensions(x, names, rank));
  int axis = feature_axis(region, rank);
  names[axis] = "";
  /* An unknown dimension without a name would be stored as the value -1, which a Reshape further down, whose target is
   * computed from this shape, then rejects. A fresh name says "unknown" and equals no other. */
  static atomic_uint unknown;
  char fresh[MAX_RANK][32];
  const WindowInfo* w = region->window;
  if (w && (int64_t)rank != w->axes + 2) return NULL;
  for (size_t d = 2; w && d < rank; ++d) { /* an unknown size stays that of the input only where the window keeps it */
    int at = (int)(d + 4 - rank) - 2, kept = w->stride[at] == 1 && spa_window_outputs(w, at, 1 << 20) == 1 << 20;
    if (dims[d] >= 0) dims[d] = spa_window_outputs(w, at, dims[d]);
    if (dims[d] >= 0 || !kept) names[d] = "";
  }
  for (size_t d = 0; d < rank; ++d)
    if ((int)d != axis && dims[d] < 0 && !*names[d]) {
      snprintf(fresh[d], sizeof fresh[d], "ai.spa.%u", atomic_fetch_add(&unknown, 1));
      names[d] = fresh[d];
    }
  for (int i = 0; i < region->outputs; ++i) {
    dims[axis] = region->output_features[i];
    TRY(CreateTensorTypeAndShapeInfo(&y));
    Status* status = SetTensorElementType(y, ELEMENT_FLOAT);
    if (!status) status = SetDimensions(y, dims, rank);
    if (!status) status = SetSymbolicDimensions(y, names, rank);
    if (!status) status = ShapeInfer_SetOutputTypeShape(context, (size_t)i, y);
    ReleaseTensorTypeAndShapeInfo(y);
    TRY(status);
  }
  return NULL;
}

const char* spa_name(const CustomOp* op) { return ((const Region*)(const void*)op)->name; }
const char* spa_provider(const CustomOp* op) { return (void)op, "CPUExecutionProvider"; }

size_t spa_input_count(const CustomOp* op) {
  const Region* r = (const Region*)(const void*)op;
  return (size_t)(r->inputs + r->masks + r->linear_count * LINEAR_ARRAYS + r->norm_count * NORM_ARRAYS);
}

int spa_input_type(const CustomOp* op, size_t index) {
  const Region* r = (const Region*)(const void*)op;
  size_t arrays = (size_t)r->linear_count * LINEAR_ARRAYS, first = (size_t)(r->inputs + r->masks);
  return index < first || index >= first + arrays ? ELEMENT_FLOAT : linear_types[(index - first) % LINEAR_ARRAYS];
}

int spa_output_type(const CustomOp* op, size_t index) { return (void)op, (void)index, ELEMENT_FLOAT; }
size_t spa_output_count(const CustomOp* op) { return (size_t)((const Region*)(const void*)op)->outputs; }
int spa_zero(const CustomOp* op, size_t index) { return (void)op, (void)index, 0; } /* required; default memory */
int spa_one(const CustomOp* op) { return (void)op, 1; }
