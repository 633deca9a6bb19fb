/* The life of a node: everything that kernels index with is checked here, once. Calls are in panels.c and images.c. */
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "region.h"

static const int linear_types[LINEAR_ARRAYS] = {ELEMENT_INT32, ELEMENT_INT32, ELEMENT_UINT16, ELEMENT_FLOAT,
                                                ELEMENT_FLOAT};
static const char* const linear_names[LINEAR_ARRAYS] = {"indptr", "order", "columns", "values", "bias"};

Status* spa_refuse_at(const char* name, const char* site, int code, const char* format, va_list arguments) {
  char message[1024];
  int length = snprintf(message, sizeof message, "ai.spa::%s at site '%s': ", name, site);
  vsnprintf(message + length, sizeof message - (size_t)length, format, arguments);
  return CreateStatus(code, message);
}

Status* spa_refuse(const Node* node, int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Status* status = spa_refuse_at(node->region->name, node->site, code, format, arguments);
  va_end(arguments);
  return status;
}

Status* spa_shape_of(const void* value, int64_t* dims, size_t limit, size_t* rank) {
  void* info;
  TRY(GetTensorTypeAndShape(value, &info));
  Status* status = GetDimensionsCount(info, rank);
  if (!status && *rank <= limit) status = GetDimensions(info, dims, *rank);
  ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

const char* spa_show(char text[160], const int64_t* dims, size_t rank) {
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
  TRY(spa_shape_of(value, dims, 2, &found));
  CHECK(node, found == rank, "%s must have %zu dimensions, it has %zu", what, rank, found);
  return GetTensorMutableData(value, data);
}

static Status* check_linear(const Node* node, int which, const int64_t size[LINEAR_ARRAYS]) {
  const LinearInfo* w = &node->region->linears[which];
  const int32_t *indptr = node->linears[which][INDPTR], *order = node->linears[which][ORDER];
  const uint16_t* columns = node->linears[which][COLUMNS];
  int64_t groups = (w->n + w->rows - 1) / w->rows, per_chunk = w->chunk / w->rows;
  int64_t blocks = (w->k + w->k_block - 1) / w->k_block, own = own_columns(w), entry = 0, entries = groups * blocks;
  int64_t cols = block_columns(w);
  CHECK(node, size[INDPTR] == entries + 1, "weight %d: indptr must have %lld elements, it has %lld", which,
        (long long)entries + 1, (long long)size[INDPTR]);
  CHECK(node, size[ORDER] == entries, "weight %d: order must have %lld elements, it has %lld", which,
        (long long)entries, (long long)size[ORDER]);
  CHECK(node, size[BIAS] == groups * w->rows, "weight %d: bias must have %lld elements, it has %lld", which,
        (long long)(groups * w->rows), (long long)size[BIAS]);
  CHECK(node, size[COLUMNS] == size[VALUES], "weight %d: %lld columns, but %lld rows of values", which,
        (long long)size[COLUMNS], (long long)size[VALUES]);
  CHECK(node, size[VALUES] < INT32_MAX / (w->rows * cols), "weight %d: too many values", which);
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
        CHECK(node, indptr[entry + 1] - indptr[entry] >= w->least_slots,
              "weight %d: a slice must have %lld slots, it has %d", which, (long long)w->least_slots,
              indptr[entry + 1] - indptr[entry]);
        /* codes point nowhere else than into the inputs of their entry */
        CHECK(node, !w->codes || (indptr[entry + 1] - indptr[entry]) * w->span == width,
              "weight %d: a group has %d steps, not %lld", which, indptr[entry + 1] - indptr[entry],
              (long long)(w->codes ? width / w->span : 0));
        for (int64_t j = indptr[entry] * own; !w->codes && j < indptr[entry + 1] * own; ++j)
          CHECK(node, columns[j] + cols <= width, "weight %d: column %d is out of range, the block has %lld", which, columns[j],
                (long long)width);
      }
    }
  return NULL;
}

/* The site is a node name of the source model, which may have any length: a long one is cut. */
Status* spa_read_site(const char* name, const void* info, char kept[MAX_SITE]) {
  size_t length = 0;
  Status* status = KernelInfoGetAttribute_string(info, "site", NULL, &length);
  if (status) {
    char message[160];
    snprintf(message, sizeof message, "ai.spa::%s: the attribute 'site' is missing or not a string", name);
    ReleaseStatus(status);
    return CreateStatus(CODE_INVALID_ARGUMENT, message);
  }
  char* site = malloc(length);
  if (!site) return CreateStatus(CODE_FAIL, "ai.spa: out of memory");
  status = KernelInfoGetAttribute_string(info, "site", site, &length);
  if (!status) {
    size_t cut = MAX_SITE - sizeof "...";
    while (length > MAX_SITE && (site[cut] & 0xc0) == 0x80) --cut; /* not inside a UTF-8 character */
    if (length > MAX_SITE) site[cut] = 0;
    snprintf(kept, MAX_SITE, "%s%s", site, length > MAX_SITE ? "..." : "");
  }
  free(site);
  return status;
}

static Status* initialize(Node* node, const void* info) {
  const Region* region = node->region;
  size_t input = spa_first_array(region);
  int64_t dims[2], size[LINEAR_ARRAYS];
  TRY(spa_read_site(region->name, info, node->site));
  node->linears = calloc((size_t)region->linear_count + 1, sizeof *node->linears);
  node->norms = calloc((size_t)region->norm_count + 1, sizeof *node->norms);
  node->depthwise = calloc((size_t)region->depthwise_count + 1, sizeof *node->depthwise);
  if (!node->linears || !node->norms || !node->depthwise) return spa_refuse(node, CODE_FAIL, "out of memory");
  for (int i = 0; i < region->linear_count; ++i) {
    for (int a = 0; a < LINEAR_ARRAYS; ++a) {
      const LinearInfo* w = &region->linears[i];
      int wide = a == VALUES || (w->interleaved && (a == ORDER || a == COLUMNS)) || (w->codes && a == COLUMNS);
      TRY(initializer(node, info, input++, linear_names[a], wide ? 2 : 1, dims, &node->linears[i][a]));
      size[a] = dims[0];
      int64_t across = a == VALUES ? w->rows * block_columns(w) : w->codes ? w->codes : w->rows;
      CHECK(node, !wide || dims[1] == across, "weight %d: %s must be [entries, %lld]", i, linear_names[a],
            (long long)across);
    }
    TRY(check_linear(node, i, size));
    spa_use_large_pages(node->linears[i][VALUES], size[VALUES] * region->linears[i].rows * block_columns(&region->linears[i]) * (int64_t)sizeof(float));
    node->weight_bytes += size[VALUES] * entry_bytes(&region->linears[i]);
  }
  for (int i = 0; i < region->norm_count; ++i)
    for (int a = 0; a < region->norms[i].arrays; ++a) {
      TRY(initializer(node, info, input++, a ? "beta" : "gamma", 1, dims, &node->norms[i][a]));
      CHECK(node, dims[0] == region->norms[i].features, "norm %d: %s must have %lld elements, not %lld", i,
            a ? "beta" : "gamma", (long long)region->norms[i].features, (long long)dims[0]);
    }
  for (int i = 0; i < region->depthwise_count; ++i) {
    const DepthwiseInfo* d = &region->depthwise[i];
    int64_t taps = d->window->size[0] * d->window->size[1];
    TRY(initializer(node, info, input++, "taps", 2, dims, &node->depthwise[i][TAPS]));
    CHECK(node, dims[0] == d->channels && dims[1] == taps, "depthwise %d: taps must be [%lld,%lld], not [%lld,%lld]", i,
          (long long)d->channels, (long long)taps, (long long)dims[0], (long long)dims[1]);
    TRY(initializer(node, info, input++, "bias", 1, dims, &node->depthwise[i][DEPTHWISE_BIAS]));
    CHECK(node, dims[0] == d->channels, "depthwise %d: bias must have %lld elements, not %lld", i,
          (long long)d->channels, (long long)dims[0]);
  }
  return KernelInfoGetAllocator(info, 0 /* OrtMemTypeDefault */, &node->allocator);
}

void spa_destroy(void* kernel) {
  Node* node = kernel;
  if (!node) return;
  if (node->allocator) ReleaseAllocator(node->allocator);
  free(node->linears);
  free(node->norms);
  free(node->depthwise);
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

Status* spa_compute(void* kernel, void* context) {
  const Node* node = kernel;
  return node->region->images ? spa_compute_images(node, context) : spa_compute_panels(node, context);
}

/* ---- what ONNX Runtime asks about an op ---- */

Status* spa_infer_shape(const CustomOp* self, void* context) {
  const Region* region = (const Region*)(const void*)self;
  return region->images ? spa_infer_images(region, context) : spa_infer_panels(region, context);
}

/* An unknown dimension without a name would be stored as the value -1, which a Reshape further down, whose target is
 * computed from this shape, then rejects. A fresh name says "unknown" and equals no other. */
static void name_unknown(const int64_t* dims, const char** names, size_t rank, char fresh[MAX_RANK][32]) {
  static atomic_uint unknown;
  for (size_t d = 0; d < rank; ++d)
    if (dims[d] < 0 && !*names[d]) {
      snprintf(fresh[d], 32, "ai.spa.%u", atomic_fetch_add(&unknown, 1));
      names[d] = fresh[d];
    }
}

Status* spa_set_shape(void* context, int type, int output, const int64_t* dims, const char** names, size_t rank) {
  char fresh[MAX_RANK][32];
  void* y;
  name_unknown(dims, names, rank, fresh);
  TRY(CreateTensorTypeAndShapeInfo(&y));
  Status* status = SetTensorElementType(y, type);
  if (!status) status = SetDimensions(y, dims, rank);
  if (!status) status = SetSymbolicDimensions(y, names, rank);
  if (!status) status = ShapeInfer_SetOutputTypeShape(context, (size_t)output, y);
  ReleaseTensorTypeAndShapeInfo(y);
  return status;
}

const char* spa_name(const CustomOp* op) { return ((const Region*)(const void*)op)->name; }
const char* spa_provider(const CustomOp* op) { return (void)op, "CPUExecutionProvider"; }

size_t spa_input_count(const CustomOp* op) {
  const Region* r = (const Region*)(const void*)op;
  return spa_first_array(r) + (size_t)(r->linear_count * LINEAR_ARRAYS + r->norm_arrays +
                  r->depthwise_count * DEPTHWISE_ARRAYS);
}

int spa_input_type(const CustomOp* op, size_t index) {
  const Region* r = (const Region*)(const void*)op;
  size_t arrays = (size_t)r->linear_count * LINEAR_ARRAYS, first = spa_first_array(r);
  return index < first || index >= first + arrays ? ELEMENT_FLOAT : linear_types[(index - first) % LINEAR_ARRAYS];
}

int spa_output_type(const CustomOp* op, size_t index) { return (void)op, (void)index, ELEMENT_FLOAT; }
size_t spa_output_count(const CustomOp* op) {
  const Region* r = (const Region*)(const void*)op;
  return (size_t)(r->outputs + r->cache_count);
}
int spa_zero(const CustomOp* op, size_t index) { return (void)op, (void)index, 0; } /* required; default memory */
int spa_one(const CustomOp* op) { return (void)op, 1; }
