/* Calls of a region on images: their sizes, places and bands, and the shapes of the outputs.
 *
 * An image is channel by channel, each a plane of height x width floats. In scratch planes lie further apart: whole
 * registers are read and written, and a distance of 4096 bytes or a multiple would put the same pixel of all channels
 * into a few sets of L1. An input or output of the node is used in place where neither matters.
 */
#include <string.h>

#include "region.h"

enum { SLACK = 32 }; /* floats behind a plane */
/* What lies between the steps of a chain: floats up to which it is not cut, and those of a band. Bands of a few rows cost
 * more for the rows that two of them compute than they gain. */
enum { UNCUT = 320 << 10, CUT = 160 << 10, LEAST_ROWS = 4, FEW_ROWS = 2 };

typedef struct { /* the inputs and outputs of a call, the first image of the batch */
  float *input[MAX_INPUTS], *output[MAX_OUTPUTS];
  int64_t batch, dims[MAX_INPUTS][MAX_RANK];
  size_t rank;
} Edges;

static int in_place(int64_t pixels) { return pixels % REGISTER == 0 && pixels % SPA_SETS != 0; }

static int64_t pitch_in_scratch(int64_t pixels) {
  int64_t pitch = blocks_of(pixels, REGISTER) * REGISTER + SLACK;
  return pitch % SPA_SETS ? pitch : pitch + SLACK;
}

/* The input that an image's size comes from in the end. */
static int root_of(const Region* region, int image) {
  while (region->images[image].kind != IMAGE_INPUT) image = region->images[image].source;
  return region->images[image].source;
}

/* ---- calls ---- */

static Status* bind_inputs(const Node* node, void* context, Edges* e) {
  const Region* region = node->region;
  char text[160], other[160];
  for (int i = 0; i < region->inputs; ++i) {
    const void* value;
    size_t rank;
    TRY(KernelContext_GetInput(context, (size_t)i, &value));
    TRY(spa_shape_of(value, e->dims[i], MAX_RANK, &rank));
    CHECK(node, rank >= 3 && rank <= MAX_RANK, "input %d must have 3 to %d dimensions, it has %zu", i, MAX_RANK, rank);
    CHECK(node, !region->axes || (int64_t)rank == region->axes + 2, "input %d must have %d dimensions, its shape is %s",
          i, region->axes + 2, spa_show(text, e->dims[i], rank));
    CHECK(node, e->dims[i][1] == region->input_features[i],
          "input %d must have %lld features on axis 1, its shape is %s", i, (long long)region->input_features[i],
          spa_show(text, e->dims[i], rank));
    CHECK(node, i == 0 || (rank == e->rank && e->dims[i][0] == e->batch),
          "inputs 0 and %d must hold the same number of images, their shapes are %s and %s", i,
          spa_show(text, e->dims[0], e->rank), spa_show(other, e->dims[i], rank));
    e->rank = rank;
    e->batch = e->dims[0][0];
    TRY(GetTensorMutableData(value, &e->input[i]));
  }
  return NULL;
}

/* The height (axis 0) or width of an image, by that of its source; < 0, if that is not known. */
static int64_t size_of(const ImageInfo* info, int axis, int64_t source) {
  if (info->kind == IMAGE_MEAN) return 1;
  if (source < 0) return source;
  if (info->window) return spa_window_outputs(info->window, axis, source);
  return info->kind == IMAGE_GROW ? source * info->grow[axis] : source;
}

/* Heights and widths of all images, from those of the inputs. */
static Status* measure(const Node* node, const Edges* e, Image* images) {
  const Region* region = node->region;
  char text[160];
  for (int i = 0; i < region->image_count; ++i) {
    const ImageInfo* info = &region->images[i];
    Image* image = &images[i];
    if (info->kind == IMAGE_INPUT) {
      const int64_t* dims = e->dims[info->source];
      int64_t pixels = 1;
      for (size_t d = 2; d < e->rank; ++d) pixels *= dims[d];
      image->width = region->axes == 2 ? dims[3] : pixels;
      image->height = region->axes == 2 ? dims[2] : 1;
    } else {
      const Image* source = &images[info->source];
      image->height = size_of(info, 0, source->height);
      image->width = size_of(info, 1, source->width);
      /* ONNX Runtime takes an image without pixels whose padding alone is as large as the window; no kernel here does. */
      CHECK(node, !info->window || (source->height && source->width && image->height && image->width),
            "the input is smaller than the window, its shape is %s",
            spa_show(text, e->dims[root_of(region, i)], e->rank));
      CHECK(node, info->kind != IMAGE_MEAN || spa_pixels(source), "the mean of no pixels, the input's shape is %s",
            spa_show(text, e->dims[root_of(region, i)], e->rank));
    }
    CHECK(node, image->height == 0 || image->width <= INT32_MAX / 2 / most(info->channels, MAX_CHUNK) / image->height,
          "an image has too many pixels for 32-bit offsets, the input's shape is %s",
          spa_show(text, e->dims[root_of(region, i)], e->rank));
  }
  for (int i = 0; i < region->image_count; ++i) {
    const Image *image = &images[i], *home = &images[region->images[i].home];
    CHECK(node, image->height == home->height && image->width == home->width,
          "channels of %lld x %lld and %lld x %lld pixels are put together", (long long)image->height,
          (long long)image->width, (long long)home->height, (long long)home->width);
  }
  return NULL;
}

static Status* bind_outputs(const Node* node, void* context, Edges* e, const Image* images) {
  const Region* region = node->region;
  for (int o = 0; o < region->outputs; ++o) {
    int64_t dims[MAX_RANK];
    void* value;
    int image = region->output_images[o];
    memcpy(dims, e->dims[root_of(region, image)], sizeof dims);
    dims[1] = region->output_features[o];
    if (region->axes == 2) dims[2] = images[image].height;
    if (region->axes) dims[e->rank - 1] = images[image].width;
    TRY(KernelContext_GetOutput(context, (size_t)o, dims, e->rank, &value));
    TRY(GetTensorMutableData(value, &e->output[o]));
  }
  return NULL;
}

/* Rows that begin at whole registers are a multiple of so many apart; where that is many, they begin anywhere. */
static int64_t aligned_rows(int64_t width) {
  int64_t unit = REGISTER;
  while (unit > 1 && width % 2 == 0) {
    width /= 2;
    unit /= 2;
  }
  return unit <= FEW_ROWS ? unit : 1;
}

/* The most rows that the images of a chain need for a band of `rows` of the last one; returns their floats. */
static int64_t need(const Region* region, const ChainInfo* chain, const Image* images, int64_t rows, int64_t* needed) {
  int64_t floats = 0;
  for (int i = chain->last; i > chain->first; --i) {
    const WindowInfo* w = region->images[i].window;
    const Image* source = &images[i - 1];
    if (w) rows = (rows - 1) * w->stride[0] + (w->size[0] - 1) * w->dilation[0] + 1;
    needed[i - 1] = rows = least(rows + aligned_rows(source->width) - 1, source->height);
    floats += region->images[i - 1].channels * pitch_in_scratch(rows * source->width);
  }
  return floats;
}

/* Rows of a band: as many as stay in L2, all bands as high as each other; little is left of bands that are too low. */
static int64_t band_of(const Region* region, const ChainInfo* chain, const Image* images, int64_t* needed) {
  const Image* last = &images[chain->last];
  int64_t rows = last->height, unit = aligned_rows(last->width);
  if (need(region, chain, images, rows, needed) <= UNCUT) return rows;
  while (rows > LEAST_ROWS && need(region, chain, images, rows, needed) > CUT) rows = (rows + 1) / 2;
  rows = blocks_of(last->height, blocks_of(last->height, rows));
  rows = least(blocks_of(rows, unit) * unit, last->height);
  need(region, chain, images, rows, needed);
  return rows;
}

int spa_image_band(const Run* r, int number, int64_t band) {
  const Region* region = r->node->region;
  const ChainInfo* chain = &region->chains[number];
  Image* last = &r->images[chain->last];
  last->first = band * r->band_rows[number];
  if (last->first >= last->height) return 0;
  last->rows = least(last->height - last->first, r->band_rows[number]);
  for (int i = chain->last; i > chain->first; --i) {
    const WindowInfo* w = region->images[i].window;
    const Image* image = &r->images[i];
    Image* source = &r->images[i - 1];
    int64_t low = image->first, high = image->first + image->rows;
    if (w) {
      high = least((high - 1) * w->stride[0] - w->pads[0] + (w->size[0] - 1) * w->dilation[0] + 1, source->height);
      low = least(most(low * w->stride[0] - w->pads[0], 0), source->height - 1); /* all of it may be padding */
    }
    low -= low % aligned_rows(source->width);
    source->base = source->first = low;
    source->held = source->rows = most(high - low, 1);
  }
  return 1;
}

/* Floats of each slot, and of what steps need besides. */
static int64_t plan(const Region* region, Image* images, int64_t* slots, int64_t* table, int64_t* bands) {
  int64_t work = 0, total = 0, needed[MAX_IMAGES];
  *table = 0;
  for (int i = 0; i < region->image_count; ++i) {
    needed[i] = images[i].rows = images[i].held = images[i].height;
    images[i].base = images[i].first = 0;
  }
  for (int c = 0; c < region->chain_count; ++c) bands[c] = band_of(region, &region->chains[c], images, needed);
  for (int s = 0; s < region->slots; ++s) slots[s] = 0;
  for (int i = 0; i < region->image_count; ++i) {
    const ImageInfo* info = &region->images[i];
    Image* image = &images[i];
    int64_t pixels = spa_pixels(image);
    image->in_scratch = info->slot >= 0 && !(region->images[info->home].kind == IMAGE_INPUT && in_place(pixels));
    image->pitch = image->in_scratch ? pitch_in_scratch(needed[i] * image->width) : pixels;
    if (image->in_scratch && info->home == i) slots[info->slot] = most(slots[info->slot], info->channels * image->pitch);
    if (info->kind == IMAGE_WINDOW)
      work = most(work, spa_window_scratch(info->window, region->images[info->source].channels, image, needed[i]));
  }
  for (int l = 0; l < region->linear_count; ++l)
    *table = most(*table, blocks_of(region->linears[l].k, REGISTER) * REGISTER);
  for (int s = 0; s < region->slots; ++s) {
    int64_t size = slots[s];
    slots[s] = total;
    total += size;
  }
  slots[region->slots] = total;
  return total + work + 2 * *table;
}

Status* spa_compute_images(const Node* node, void* context) {
  const Region* region = node->region;
  Edges e = {.batch = 0};
  Image images[MAX_IMAGES];
  int64_t slots[MAX_IMAGES + 1], bands[MAX_IMAGES], table;
  TRY(bind_inputs(node, context, &e));
  TRY(measure(node, &e, images));
  TRY(bind_outputs(node, context, &e, images));
  int empty = e.batch == 0;
  for (int i = 0; i < region->image_count; ++i) empty |= spa_pixels(&images[i]) == 0;
  if (empty) return NULL;

  int64_t floats = plan(region, images, slots, &table, bands);
  CHECK(node, floats <= INT32_MAX, "an image has too many pixels for 32-bit offsets, scratch would take %lld floats",
        (long long)floats);
  size_t bytes = sizeof(float) * (size_t)floats + 64;
  void* block = node->allocator->Alloc(node->allocator, bytes);
  if (!block) return spa_refuse(node, CODE_FAIL, "no memory for %zu bytes of scratch", bytes);
  float* scratch = (float*)(((uintptr_t)block + 63) / 64 * 64);
  Run r = {.node = node, .context = context, .images = images, .table = table, .band_rows = bands};
  r.offsets = (int32_t*)(void*)(scratch + slots[region->slots]);
  r.scratch = scratch + slots[region->slots] + 2 * table;
  Status* status = NULL;
  for (int64_t n = 0; !status && n < e.batch; ++n) {
    for (int i = 0; i < region->image_count; ++i) {
      const ImageInfo* info = &region->images[i];
      int64_t size = info->channels * spa_pixels(&images[i]);
      if (info->home != i) continue;
      if (info->kind == IMAGE_INPUT) r.input[info->source] = e.input[info->source] + n * size;
      images[i].at = images[i].in_scratch           ? scratch + slots[info->slot]
                     : info->kind == IMAGE_INPUT ? e.input[info->source] + n * size
                                                 : e.output[-1 - info->slot] + n * size;
    }
    for (int i = 0; i < region->image_count; ++i)
      images[i].at = images[region->images[i].home].at + region->images[i].first * images[i].pitch;
    for (int o = 0; o < region->outputs; ++o)
      r.output[o] = e.output[o] + n * region->output_features[o] * spa_pixels(&images[region->output_images[o]]);
    status = region->run(&r);
  }
  node->allocator->Free(node->allocator, block);
  return status;
}

/* ---- shapes ---- */

Status* spa_infer_images(const Region* region, void* context) {
  int64_t dims[MAX_INPUTS][MAX_RANK], sizes[MAX_IMAGES][2];
  const char *names[MAX_INPUTS][MAX_RANK], *named[MAX_IMAGES][2];
  size_t rank = 0;
  for (int i = 0; i < region->inputs; ++i) {
    void* x;
    TRY(ShapeInfer_GetInputTypeShape(context, (size_t)i, &x)); /* borrowed */
    TRY(GetDimensionsCount(x, &rank));
    if (rank < 3 || rank > MAX_RANK || (region->axes && (int64_t)rank != region->axes + 2))
      return NULL; /* unknown shape: leave the outputs unknown */
    TRY(GetDimensions(x, dims[i], rank));
    TRY(GetSymbolicDimensions(x, names[i], rank));
  }
  for (int i = 0; i < region->image_count; ++i) {
    const ImageInfo* info = &region->images[i];
    for (int axis = 0; axis < 2; ++axis) {
      if (info->kind == IMAGE_INPUT) {
        int there = axis || region->axes == 2; /* of one axis the second is the width */
        size_t d = rank - 2 + (size_t)axis;
        sizes[i][axis] = there ? dims[info->source][d] : 1;
        named[i][axis] = there ? names[info->source][d] : "";
        continue;
      }
      int64_t size = sizes[info->source][axis];
      sizes[i][axis] = size_of(info, axis, size);
      /* an unknown size stays that of the input only where the window keeps it */
      int kept = size_of(info, axis, 1 << 20) == 1 << 20 && (!info->window || info->window->stride[axis] == 1);
      named[i][axis] = size >= 0 || kept ? named[info->source][axis] : "";
    }
  }
  for (int o = 0; o < region->outputs; ++o) {
    int image = region->output_images[o], root = root_of(region, image);
    int64_t own[MAX_RANK];
    const char* called[MAX_RANK];
    memcpy(own, dims[root], sizeof own);
    memcpy(called, names[root], sizeof called);
    own[1] = region->output_features[o];
    called[1] = "";
    for (int axis = 2 - region->axes; region->axes && axis < 2; ++axis) {
      own[rank - 2 + (size_t)axis] = sizes[image][axis];
      called[rank - 2 + (size_t)axis] = named[image][axis];
    }
    TRY(spa_set_shape(context, ELEMENT_FLOAT, o, own, called, rank));
  }
  return NULL;
}
