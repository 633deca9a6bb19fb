/* A region: neighbouring operators that run as one node, activations kept in panels or images in between.
 *
 * The compiler writes one function per region, a straight line of the steps below, and one table of all regions.
 * Layers of tokens run on panels (panels.c, steps.c), convolutions on images (images.c, pixels.c, window.c, depthwise.c,
 * and between.c for what has no weight).
 *
 * A panel of `features` rows is its tiles one after the other, each [spa_rows(features), lanes] floats; places in
 * scratch are given in rows, so that a plan made at compile time holds for any number of tokens.
 */
#ifndef SPA_REGION_H
#define SPA_REGION_H
#include <stdarg.h>
#include <stdint.h>

#include "ort_abi.h"

enum { LANE_COUNTS = 7, MAX_LANES = 64, MAX_CHUNK = 256, MAX_INPUTS = 8, MAX_OUTPUTS = 8, MAX_MASKS = 4, MAX_RANK = 8,
       MAX_SITE = 256 };
enum { MAX_TABLES = 4, MAX_CACHES = 32 }; /* of rotary positions; of keys and of values, each */
enum { CACHE_KEYS = 128, MAX_SHARED = 32, MAX_QUERY = 4096 }; /* spa_compiler/kernels/cached.py; floats of a query */
enum { MAX_IMAGES = 1024, REGISTER = 16, SPA_SETS = 1024 }; /* floats between what shares the sets of L1 */
enum { LINEAR_ARRAYS = 5, NORM_ARRAYS = 2, DEPTHWISE_ARRAYS = 2 }; /* NORM_ARRAYS: at most */
enum { TAPS, DEPTHWISE_BIAS };
enum { INDPTR, ORDER, COLUMNS, VALUES, BIAS };

typedef void Multiply(const float* panel, const int32_t* offsets, const int32_t* indptr, const int32_t* order,
                 const uint16_t* columns, const float* values, const float* bias, const float* base, float* out,
                 int32_t groups, int32_t mode, int32_t last, int32_t base_pitch, int32_t out_pitch, float low,
                 float high);
typedef void Shift(const float* x, float* to, int32_t top, int32_t rows, int32_t phases, int32_t height, int32_t width,
                   int32_t pitch, int32_t low, int32_t high, int32_t left, int32_t step, int32_t before, int32_t behind,
                   float fill);
typedef void Crop(const float* tile, float* plane, const int32_t* runs, int32_t count);
typedef void Depthwise(const float* buffer, const float* taps, const float* bias, float* out, int32_t height,
                       int32_t width, int32_t plane, int32_t pitch, int32_t out_pitch, float low, float high);
typedef void Pad(const float* x, float* buffer, int32_t top, int32_t rows, int32_t bottom, int32_t width, int32_t left,
                 int32_t plane, int32_t pitch, int32_t step, float fill);
typedef void Combine(const float* a, const float* b, float* out, int32_t registers, float low, float high);
typedef void Pack(const float* x, float* panel, int32_t tokens, int32_t features, int32_t stride);
typedef void Unpack(const float* panel, float* y, int32_t tokens, int32_t features, int32_t stride);
typedef void Attend(const float* q, const float* k, const float* v, const float* mask, float* scores, float* state,
                    float* out, int32_t depth, int32_t keys, int32_t mask_stride, int32_t part, float scale);
typedef void Cached(const float* q, const float* k, const float* v, const float* mask, float* scores, float* state,
                    float* out, int32_t keys, int32_t mask_stride, int32_t part, float scale);
typedef void Rotate(const float* x, const float* cos, const float* sin, float* out, int32_t count);
typedef void Gate(float* x, const float* factor, int32_t count);
typedef void Norm(const float* x, const float* gamma, const float* beta, float* out, int32_t features, float epsilon);

/* A weight; spa_compiler/kernels/rx1.py has the format, with `cols` rxc.py, with `codes` grouped.py, interleaved
 * sliced.py and permuted.py. */
typedef struct {
  int64_t n, k, rows, chunk, k_block, interleaved; /* rows: of a group. interleaved: each has columns of its own */
  int64_t cols; /* of a block, from its column on; 0: one */
  int64_t codes, span; /* uint16 of an entry in the place of columns, and its inputs; else 0. All groups have as many */
  int64_t pitched; /* on images: the table of offsets is one number, what channels are apart */
  int64_t least_slots; /* of a group that its kernel reads without asking, permuted.py */
  float low, high;
  Multiply* const* kernels; /* one per lane count; on images one for each of 1 to 4 registers */
} LinearInfo;

typedef struct { /* of a convolution, [height, width]: spa_compiler/kernels/window.py */
  int64_t size[2], stride[2], dilation[2], pads[4]; /* pads: top, left, bottom, right */
} WindowInfo;

typedef struct { /* spa_compiler/kernels/depthwise.py */
  int64_t channels;
  const WindowInfo* window;
  float low, high;
  Depthwise* kernel;
} DepthwiseInfo;

typedef struct { /* spa_compiler/kernels/combine.py */
  int scales; /* each channel by one pixel */
  float low, high;
  Combine* kernel;
} CombineInfo;

/* IMAGE_VIEW: channels of other images, without a step of its own. */
enum { IMAGE_INPUT, IMAGE_LINEAR, IMAGE_WINDOW, IMAGE_DEPTHWISE, IMAGE_LARGEST, IMAGE_MEAN, IMAGE_COMBINE, IMAGE_GROW,
       IMAGE_EVERY, IMAGE_VIEW };
typedef struct { /* what a step makes */
  int64_t channels;
  int kind, source; /* the input's number, or the image that it is made of and that gives its size */
  const WindowInfo* window; /* that the size is seen through, or NULL */
  int slot;                 /* of scratch; < 0: it is output -1 - slot of the node */
  int home;                 /* the image whose channels from `first` on it is; itself, where it is no part of another */
  int64_t first;
  int64_t grow[2]; /* rows and columns that each of the source becomes */
} ImageInfo;

typedef struct { /* images that are computed band by band: all but the last exist only for the band at hand */
  int first, last;
} ChainInfo;

typedef struct {
  int64_t features;
  float epsilon;
  int arrays; /* gamma; a LayerNormalization has beta, too */
  Norm* const* kernels;
} NormInfo;

typedef struct { /* softmax(scale Q^T K + mask) V, head by head; scale in units of log2 */
  int64_t heads, depth, shared; /* shared: query heads with the same head of keys and values */
  float scale;
  int64_t at_once; /* query heads that one call of `cached` takes */
  Attend* const* kernels; /* keys and values in panels */
  Cached* cached;         /* keys and values behind those of a cache */
} AttentionInfo;

typedef struct { /* keys or values of a cache: [batch, heads, tokens, depth] */
  int64_t heads, depth;
} CacheInfo;

typedef struct Run Run;
typedef struct {
  CustomOp op; /* first: ONNX Runtime hands its address back */
  const char* name;
  Status* (*run)(const Run*);
  Pack* const* pack;
  Unpack* const* unpack;
  Gate* gate;
  Rotate* rotate;
  const CacheInfo* caches;
  const LinearInfo* linears;
  const NormInfo* norms;
  const AttentionInfo* attentions;
  const DepthwiseInfo* depthwise;
  const DepthwiseInfo* largest; /* the largest value of a window; no taps, no bias */
  const CombineInfo* combines;
  const ImageInfo* images; /* NULL: a region on panels */
  const ChainInfo* chains;
  Shift* shift;
  Crop* crop;
  Pad* pad;
  int64_t scratch_rows;
  int64_t input_features[MAX_INPUTS], output_features[MAX_OUTPUTS];
  int64_t table_features[MAX_TABLES];
  int tables, cache_count;
  int inputs, masks, outputs, linear_count, norm_count, norm_arrays, depthwise_count;
  int output_images[MAX_OUTPUTS];
  int image_count, chain_count, slots, axes; /* of the windows in a region on images: 1 or 2, 0 without any */
  int whole_sequences; /* rows are [batch, tokens, features] and tiles never cross a sequence */
} Region;

/* Written by the compiler, per artifact. */
typedef struct {
  int level; /* of x86-64, that its kernels need; 1: any machine of the architecture */
  const Region* regions;
} Table;
extern const Table spa_tables[]; /* the highest level first; the same regions in each */
extern const int spa_table_count, spa_region_count;

struct Node;

/* Calls and shapes, by kind of region. */
extern Status* spa_compute_panels(const struct Node*, void* context);
extern Status* spa_compute_images(const struct Node*, void* context);
extern Status* spa_infer_panels(const Region*, void* context);
extern Status* spa_infer_images(const Region*, void* context);
/* Sets the type and the shape of an output; what is unknown (< 0) and has no name in `names` gets one of its own. */
extern Status* spa_set_shape(void* context, int type, int output, const int64_t* dims, const char** names, size_t rank);

/* "ai.spa::Region_1234 at site 'encoder/dense': ..." */
extern Status* spa_refuse(const struct Node*, int code, const char* format, ...);
extern Status* spa_refuse_at(const char* name, const char* site, int code, const char* format, va_list);
extern Status* spa_read_site(const char* name, const void* info, char site[MAX_SITE]); /* cut, where it is longer */
extern Status* spa_shape_of(const void* value, int64_t* dims, size_t limit, size_t* rank);
extern const char* spa_show(char text[160], const int64_t* dims, size_t rank);
#define CHECK(node, condition, ...)                                                \
  do {                                                                             \
    if (!(condition)) return spa_refuse(node, CODE_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)

/* The callbacks that all regions share. */
extern const char* spa_name(const CustomOp*);
extern const char* spa_provider(const CustomOp*);
extern int spa_input_type(const CustomOp*, size_t), spa_output_type(const CustomOp*, size_t);
extern size_t spa_input_count(const CustomOp*), spa_output_count(const CustomOp*);
extern int spa_zero(const CustomOp*, size_t), spa_one(const CustomOp*);
extern Status *spa_create(const CustomOp*, Api, const void*, void**), *spa_compute(void*, void*);
extern Status* spa_infer_shape(const CustomOp*, void*);
extern void spa_destroy(void*);
#define SPA_CUSTOM_OP                                                                                          \
  {                                                                                                            \
    .version = SPA_API_VERSION, .GetName = spa_name, .GetExecutionProviderType = spa_provider,                 \
    .GetInputType = spa_input_type, .GetInputTypeCount = spa_input_count, .GetOutputType = spa_output_type,    \
    .GetOutputTypeCount = spa_output_count, .KernelDestroy = spa_destroy, .GetInputCharacteristic = spa_zero,  \
    .GetOutputCharacteristic = spa_zero, .GetInputMemoryType = spa_zero, .GetVariadicInputMinArity = spa_one,  \
    .GetVariadicInputHomogeneity = spa_one, .GetVariadicOutputMinArity = spa_one,                              \
    .GetVariadicOutputHomogeneity = spa_one, .CreateKernelV2 = spa_create, .KernelComputeV2 = spa_compute,     \
    .InferOutputShape = spa_infer_shape, .GetStartVersion = spa_one, .GetEndVersion = spa_one                  \
  }

typedef const void* Arrays[LINEAR_ARRAYS];
typedef struct Node { /* a node: initializers validated once, then read in place; nothing changes after creation */
  const Region* region;
  Arrays* linears;
  Arrays* norms;
  Arrays* depthwise;
  int64_t weight_bytes; /* of the linears */
  Allocator* allocator; /* the session's arena: a malloc of this size would fault its pages in every call */
  char site[MAX_SITE];
} Node;

typedef struct { /* where an image lies: channel by channel, row by row without gaps, in scratch with slack behind */
  float* at;
  int64_t pitch, height, width; /* pitch: floats from channel to channel */
  int64_t base, held;           /* the row that `at` points at, and how many there are: all, outside of a chain */
  int64_t first, rows;          /* what is to be computed of it now */
  int in_scratch;
} Image;

struct Run { /* one call */
  const Node* node;
  void* context;
  const float* input[MAX_INPUTS];
  const float* mask[MAX_MASKS]; /* additive, [batch or 1, heads or 1, tokens or 1, keys], or without leading ones */
  int64_t mask_dims[MAX_MASKS][4];
  const float* rotary[MAX_TABLES]; /* [batch or 1, 1, tokens, features], or without leading ones */
  int64_t rotary_stride[MAX_TABLES]; /* from sequence to sequence; 0: one for all */
  const float* past[MAX_CACHES]; /* [batch, heads, past, depth] */
  int64_t past_tokens[MAX_CACHES];
  float* present[MAX_CACHES]; /* the same with the new tokens behind: outputs of the node, after the others */
  float* output[MAX_OUTPUTS];
  int64_t sequences, tokens; /* tokens of each sequence: 1 sequence, unless whole_sequences */
  int64_t tiles_per_sequence, lanes;
  int64_t first_tile, tiles; /* what is computed now: a band of all tiles, whose panels stay in L2 */
  int lane_index;
  float* scratch;
  Image* images; /* of a region on images, the one at hand of a batch */
  int32_t* offsets; /* two tables of `table` offsets each */
  int64_t table;
  const int64_t* band_rows; /* of the last image of each chain */
};

enum { ACCUMULATE, START_BIAS, START_RESIDUAL }; /* how the sums of a product begin: modes of a Multiply */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t blocks_of(int64_t total, int64_t size) { return (total + size - 1) / size; }
/* Rows of a group with a place and columns of their own; else they have both together. */
static inline int64_t own_columns(const LinearInfo* w) { return w->interleaved ? w->rows : 1; }
static inline int64_t block_columns(const LinearInfo* w) { return w->cols ? w->cols : 1; }
static inline int64_t entry_bytes(const LinearInfo* w) { /* values and columns of what `indptr` counts */
  return w->rows * block_columns(w) * (int64_t)sizeof(float) + (w->codes ? w->codes : own_columns(w)) * (int64_t)sizeof(uint16_t);
}
/* The node's inputs before its initializers. */
static inline size_t spa_first_array(const Region* r) {
  return (size_t)(r->inputs + r->masks + r->tables + r->cache_count);
}
static inline int64_t spa_rows(int64_t features) { return (features + 15) / 16 * 16; }

/* The steps. Panels are named by their place in scratch; `residual` < 0: none. */
Status* spa_pack(const Run*, int input, int64_t to);
Status* spa_linear(const Run*, int linear, int64_t from, int64_t residual, int64_t to);
Status* spa_linear_out(const Run*, int linear, int64_t from, int64_t residual, int output); /* unpacks chunk by chunk */
/* Two products in one pass, the second into the accumulators of the first; bias from the first, activation from the
 * second. Both have the same chunks. */
Status* spa_sum(const Run*, int first, int64_t from, int second, int64_t second_from, int64_t residual, int64_t to);
Status* spa_sum_out(const Run*, int first, int64_t from, int second, int64_t second_from, int64_t residual, int output);
/* The same, times the panel `factor` behind the activation. */
Status* spa_linear_times(const Run*, int linear, int64_t from, int64_t residual, int64_t factor, int64_t to);
Status* spa_sum_times(const Run*, int first, int64_t from, int second, int64_t second_from, int64_t residual,
                      int64_t factor, int64_t to);
Status* spa_norm(const Run*, int norm, int64_t from, int64_t to);
/* `mask` < 0: none. q and `to` are panels of heads x depth features, k and v of heads / shared x depth. */
Status* spa_attention(const Run*, int attention, int64_t q, int64_t k, int64_t v, int mask, int64_t to);
/* The same behind the keys of `cache` and the values of the one after it; k and v are put behind them in the outputs. */
Status* spa_attention_cached(const Run*, int attention, int64_t q, int64_t k, int64_t v, int mask, int cache, int64_t to);
Status* spa_table(const Run*, int table, int64_t to); /* packs it, for all sequences */
/* Rotary positions of heads of `depth` features; cos and sin are panels of `depth`. */
Status* spa_rotate(const Run*, int64_t heads, int64_t depth, int64_t from, int64_t cos, int64_t sin, int64_t to);
Status* spa_unpack(const Run*, int output, int64_t from);

/* Steps on images, which are named by their numbers; `residual` < 0 and `second` < 0: none. */
Status* spa_image_in(const Run*, int to);
Status* spa_image_linear(const Run*, int linear, int from, int second, int second_from, int residual, int to);
Status* spa_image_window(const Run*, int linear, int from, int residual, int to);
Status* spa_image_depthwise(const Run*, int depthwise, int from, int to);
void spa_use_large_pages(const void* data, int64_t bytes);
Status* spa_image_largest(const Run*, int largest, int from, int to);
Status* spa_image_mean(const Run*, int from, int to);
Status* spa_image_combine(const Run*, int combine, int from, int other, int to); /* `other` < 0: a copy */
Status* spa_image_every(const Run*, int from, int to); /* pixels as far apart as the stride of `to`'s window says */
Status* spa_image_repeat(const Run*, int from, int to); /* every pixel as many times as its image grows */
Status* spa_image_unfold(const Run*, int from, int to); /* channels (y, x, channel) -> pixels (y, x) of each channel */
Status* spa_image_out(const Run*, int from, int output);
int spa_image_band(const Run*, int chain, int64_t number); /* sets the rows of a chain's images; 0: there is no such band */

int64_t spa_window_outputs(const WindowInfo*, int axis, int64_t size); /* 0: the input is smaller than the window */
/* Floats of scratch that a window on `channels` needs for any number of rows up to `rows` of an image. */
int64_t spa_window_scratch(const WindowInfo*, int64_t channels, const Image* to, int64_t rows);
void spa_clear_slack(const Image*, int64_t channel); /* what lies behind a channel is read with it: no denormals there */
static inline int64_t spa_pixels(const Image* image) { return image->height * image->width; }
/* The place of the first pixel to compute of `to`, in a channel of an image of the same size. */
static inline int64_t spa_first_pixel(const Image* to, const Image* in) { return (to->first - in->base) * to->width; }

typedef struct { /* where the rows of a tile lie */
  float* at;
  int64_t pitch; /* floats from one to the next */
} Rows;

/* The part of a product in one chunk of one tile, block of columns by block. `from` is the tile, its columns one after the
 * other, or wherever `offsets` (else NULL) says. `start` is the mode of the first block, `base` the chunk's residual. */
void spa_add_product(const LinearInfo*, const void* const* arrays, int kernel, Rows from, const int32_t* offsets,
                     int64_t chunk, int start, int last, Rows base, Rows out);
/* Fetches what kernels do not fetch ahead themselves of a chunk: all but values and columns, and the first of those. */
void spa_fetch_chunk(const LinearInfo*, const void* const* arrays, int64_t chunk);

#endif
