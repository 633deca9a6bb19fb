/* The life of a node for the CUDA provider. Everything that can fail or wait happens when it is made: weights are looked at,
 * kernels loaded. A call reads shapes and launches one kernel on ONNX Runtime's stream; it takes no memory and waits for
 * nothing, so that it can be recorded into a CUDA graph. */
#include <stdlib.h>
#include <string.h>

#include "gpu.h"
#include "region.h"

enum { ALIGNMENT = 16, MOST_BLOCKS = 65535 }; /* of pointers, as kernels copy 16 bytes at once; of blocks on axes y and z */
enum { DEVICE_GPU = 1, ATTRIBUTE_INT = 1 };   /* OrtMemoryInfoDeviceType, OrtOpAttrType */
enum { KERNEL_ARGUMENTS = GPU_ARRAYS + 10 };

typedef struct { /* nothing changes after creation */
  const GpuInfo* info;
  const GpuDriver* driver;
  int32_t n, k;
  float low, high;
  uint64_t arrays[GPU_ARRAYS], bias; /* addresses in the GPU */
  GpuFunction* functions[GPU_VARIANTS];
  char site[MAX_SITE];
} GpuNode;

static Status* refuse(const GpuNode* node, int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Status* status = spa_refuse_at(node->info->name, node->site, code, format, arguments);
  va_end(arguments);
  return status;
}
#undef CHECK
#define CHECK(node, condition, ...)                                            \
  do {                                                                         \
    if (!(condition)) return refuse(node, CODE_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)

/* ---- creation ---- */

static Status* read_size(const GpuNode* node, const void* info, const char* name, int32_t* out) {
  int64_t value = 0;
  Status* status = KernelInfoGetAttribute_int64(info, name, &value);
  if (status) ReleaseStatus(status);
  CHECK(node, !status && value >= 1 && value <= INT32_MAX, "the attribute '%s' must be a positive 32-bit integer", name);
  *out = (int32_t)value;
  return NULL;
}

static Status* read_bound(const GpuNode* node, const void* info, const char* name, float* out) {
  Status* status = KernelInfoGetAttribute_float(info, name, out);
  if (status) ReleaseStatus(status);
  CHECK(node, !status, "the attribute '%s' is missing or not a float", name);
  return NULL;
}

/* An initializer: its shape, its address in the GPU `device`, which the first one names. */
static Status* initializer(const GpuNode* node, const void* info, size_t index, const char* what, int rank, int64_t* dims,
                           int* device, uint64_t* address) {
  int constant = 0, type = 0, id = 0;
  const void *value = NULL, *where;
  size_t found;
  void* data;
  TRY(KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
  CHECK(node, constant && value, "input %zu (%s) must be an initializer", index, what);
  TRY(spa_shape_of(value, dims, GPU_RANK, &found));
  CHECK(node, found == (size_t)rank, "%s must have %d dimensions, it has %zu", what, rank, found);
  TRY(GetTensorMemoryInfo(value, &where));
  MemoryInfoGetDeviceType(where, &type);
  TRY(MemoryInfoGetId(where, &id));
  CHECK(node, type == DEVICE_GPU, "%s is not in the memory of a GPU", what);
  CHECK(node, *device < 0 || *device == id, "%s is on GPU %d, other weights are on GPU %d", what, id, *device);
  *device = id;
  TRY(GetTensorMutableData(value, &data));
  *address = (uint64_t)(uintptr_t)data;
  CHECK(node, *address % ALIGNMENT == 0, "the address of %s must be a multiple of %d", what, ALIGNMENT);
  return NULL;
}

/* Indices lie where only the GPU reads them: they are copied here once, looked at and forgotten. */
static Status* look_into(const GpuNode* node, const GpuArray* array, const GpuSizes* sizes, uint64_t address, int64_t size,
                         const GpuFunction* f) {
  char words[GPU_WORDS];
  size_t bytes = (size_t)size * spa_element_bytes(array->type);
  void* copy = malloc(bytes + 1);
  if (!copy) return refuse(node, CODE_FAIL, "out of memory");
  int result = 0, sound = 0;
  if (bytes) {
    void* popped;
    result = node->driver->cuCtxPushCurrent(f->context);
    if (!result) {
      result = node->driver->cuMemcpyDtoH(copy, address, bytes);
      node->driver->cuCtxPopCurrent(&popped);
    }
  }
  if (result) spa_gpu_failed(node->driver, "cuMemcpyDtoH", result, words);
  else sound = spa_gpu_sound(array, sizes, copy, size, words);
  free(copy);
  return sound ? NULL : refuse(node, result ? CODE_FAIL : CODE_INVALID_ARGUMENT, "%s", words);
}

static Status* initialize(GpuNode* node, const void* info) {
  const GpuInfo* g = node->info;
  char words[GPU_WORDS] = "";
  int64_t size[GPU_ARRAYS], dims[GPU_RANK];
  int device = -1;
  size_t input = g->residual ? 2 : 1;
  TRY(spa_read_site(g->name, info, node->site));
  TRY(read_size(node, info, "n", &node->n));
  TRY(read_size(node, info, "k", &node->k));
  if (g->bounded) {
    TRY(read_bound(node, info, "low", &node->low));
    TRY(read_bound(node, info, "high", &node->high));
  }
  GpuSizes sizes = {node->n, node->k, {-1, -1, -1, -1}};
  for (int i = 0; i < g->array_count; ++i) {
    const GpuArray* a = g->arrays + i;
    TRY(initializer(node, info, input++, a->name, a->rank, dims, &device, &node->arrays[i]));
    CHECK(node, spa_gpu_fits(a, &sizes, dims, words), "%s", words);
    size[i] = 1;
    for (int d = 0; d < a->rank; ++d) size[i] *= dims[d];
  }
  TRY(initializer(node, info, input, "bias", 1, dims, &device, &node->bias));
  CHECK(node, dims[0] == node->n, "bias must have %d elements, it has %lld", node->n, (long long)dims[0]);
  for (int i = 0; i < g->variant_count; ++i) {
    const GpuKernel* kernel = g->variants[i].kernel;
    CHECK(node, blocks_of(node->n, kernel->tile_rows) <= MOST_BLOCKS, "%d outputs are too many for blocks of %d", node->n,
          kernel->tile_rows);
  }
  node->driver = spa_gpu_driver(words);
  if (!node->driver) return refuse(node, CODE_FAIL, "%s", words);
  for (int i = 0; i < g->variant_count; ++i) {
    node->functions[i] = spa_gpu_acquire(node->driver, g->variants[i].kernel, device, g->archs, words);
    if (!node->functions[i]) return refuse(node, CODE_FAIL, "%s", words);
  }
  for (int i = 0; i < g->array_count; ++i)
    if (g->arrays[i].check != GPU_ANY)
      TRY(look_into(node, g->arrays + i, &sizes, node->arrays[i], size[i], node->functions[0]));
  return NULL;
}

void spa_gpu_destroy(void* kernel) {
  GpuNode* node = kernel;
  if (!node) return;
  for (int i = 0; i < node->info->variant_count; ++i)
    if (node->functions[i]) spa_gpu_release(node->driver, node->functions[i]);
  free(node);
}

Status* spa_gpu_create(const CustomOp* self, Api unused, const void* info, void** kernel) {
  (void)unused;
  GpuNode* node = calloc(1, sizeof *node);
  *kernel = NULL;
  if (!node) return CreateStatus(CODE_FAIL, "ai.spa: out of memory");
  node->info = ((const GpuOp*)(const void*)self)->info;
  Status* status = initialize(node, info);
  if (status) {
    spa_gpu_destroy(node);
    return status;
  }
  *kernel = node;
  return NULL;
}

/* What a session does with a node when its provider is not there: it looks for one on the CPU. */
Status* spa_gpu_create_cpu(const CustomOp* self, Api unused, const void* info, void** kernel) {
  (void)unused;
  GpuNode node = {.info = ((const GpuOp*)(const void*)self)->info};
  *kernel = NULL;
  TRY(spa_read_site(node.info->name, info, node.site));
  return refuse(&node, CODE_NOT_IMPLEMENTED,
                "this model was compiled for NVIDIA GPUs (%s), and this session runs it on the CPU. It needs onnxruntime-gpu, a "
                "GPU, and providers=['CUDAExecutionProvider']; portable.onnx runs on CPUs", node.info->archs);
}

/* ---- calls ---- */

/* Sizes of x: its last axis, or the second one of images, has k features. y has n there. */
static Status* measure(const GpuNode* node, const int64_t* dims, size_t rank, size_t* axis, int64_t* tokens, int64_t* batch) {
  char text[160];
  int images = node->info->layout != GPU_ROWS, planes = node->info->layout == GPU_PLANES;
  size_t least_rank = images ? 3 : 1;
  CHECK(node, rank >= least_rank && rank <= MAX_RANK, "input 0 must have %zu to %d dimensions, it has %zu", least_rank,
        MAX_RANK, rank);
  *axis = images ? 1 : rank - 1;
  CHECK(node, dims[*axis] == node->k, "input 0 must have %d features on axis %zu, its shape is %s", node->k, *axis,
        spa_show(text, dims, rank));
  for (size_t d = 2; d < rank; ++d)
    CHECK(node, node->info->layout != GPU_PIXEL || dims[d] == 1, "input 0 must have images of one pixel, its shape is %s",
          spa_show(text, dims, rank));
  *batch = planes ? dims[0] : 1;
  *tokens = 1;
  int none = 0, large = 0;
  for (size_t d = 0; d < rank; ++d) none |= dims[d] == 0;
  if (none) return *tokens = 0, NULL;
  for (size_t d = planes ? 1 : 0; d < rank && !large; ++d)
    if (d != *axis) large = __builtin_mul_overflow(*tokens, dims[d], tokens);
  large = large || *tokens > INT32_MAX || *batch > INT32_MAX || *tokens * *batch > INT32_MAX / most(node->n, node->k);
  CHECK(node, !large, "an input of shape %s is too large for 32-bit offsets", spa_show(text, dims, rank));
  CHECK(node, *batch <= MOST_BLOCKS, "a batch of %lld is too large, %d are possible", (long long)*batch, MOST_BLOCKS);
  return NULL;
}

static Status* address_of(const GpuNode* node, const void* value, const char* what, uint64_t* address) {
  void* data;
  TRY(GetTensorMutableData(value, &data));
  *address = (uint64_t)(uintptr_t)data;
  CHECK(node, *address % ALIGNMENT == 0, "the address of %s must be a multiple of %d bytes", what, ALIGNMENT);
  return NULL;
}

static Status* launch(const GpuNode* node, const GpuFunction* f, int64_t tokens, int64_t batch, void* stream,
                      void** arguments) {
  const GpuDriver* d = node->driver;
  const GpuKernel* kernel = f->kernel;
  char words[GPU_WORDS];
  const char* called = "cuCtxGetCurrent";
  void *current = NULL, *popped;
  int result = d->cuCtxGetCurrent(&current), elsewhere = current != f->context;
  /* ONNX Runtime sets the device of the threads that it runs in; which context is current depends on the version of CUDA. */
  if (!result && elsewhere) called = "cuCtxPushCurrent", result = d->cuCtxPushCurrent(f->context);
  if (!result) {
    called = "cuLaunchKernel";
    result = d->cuLaunchKernel(f->function, (unsigned)blocks_of(tokens, kernel->tile_tokens),
                               (unsigned)blocks_of(node->n, kernel->tile_rows), (unsigned)batch, (unsigned)kernel->threads, 1,
                               1, (unsigned)kernel->shared_bytes, stream, arguments, NULL);
    if (elsewhere) d->cuCtxPopCurrent(&popped);
  }
  if (!result) return NULL;
  spa_gpu_failed(d, called, result, words);
  return refuse(node, CODE_FAIL, "%s, to launch %s", words, kernel->name);
}

Status* spa_gpu_compute(void* kernel, void* context) {
  const GpuNode* node = kernel;
  const GpuInfo* g = node->info;
  const void *x, *added;
  void *y, *stream = NULL;
  int64_t dims[MAX_RANK], other[MAX_RANK], tokens = 0, batch = 0;
  size_t rank, other_rank, axis = 0;
  char text[160], other_text[160];
  TRY(KernelContext_GetInput(context, 0, &x));
  TRY(spa_shape_of(x, dims, MAX_RANK, &rank));
  TRY(measure(node, dims, rank, &axis, &tokens, &batch));
  dims[axis] = node->n;
  uint64_t from, residual = 0, to;
  if (g->residual) {
    TRY(KernelContext_GetInput(context, 1, &added));
    TRY(spa_shape_of(added, other, MAX_RANK, &other_rank));
    CHECK(node, other_rank == rank && !memcmp(dims, other, rank * sizeof *dims), "the residual must be %s, it is %s",
          spa_show(text, dims, rank), spa_show(other_text, other, other_rank));
  }
  TRY(KernelContext_GetOutput(context, 0, dims, rank, &y));
  if (tokens * batch == 0) return NULL;
  TRY(address_of(node, x, "input 0", &from));
  TRY(address_of(node, y, "the output", &to));
  if (g->residual) TRY(address_of(node, added, "the residual", &residual));
  TRY(KernelContext_GetGPUComputeStream(context, &stream));

  int variant = 0;
  while (variant + 1 < g->variant_count && g->variants[variant].most_tokens < tokens) ++variant;
  int32_t n = node->n, k = node->k, token_count = (int32_t)tokens, images = (int32_t)batch;
  float low = node->low, high = node->high;
  void* arguments[KERNEL_ARGUMENTS];
  int count = 0;
  for (int i = 0; i < g->array_count; ++i) arguments[count++] = (void*)(uintptr_t)&node->arrays[i];
  void* rest[] = {&from, (void*)(uintptr_t)&node->bias, &residual, &to, &n, &k, &token_count, &images, &low, &high};
  memcpy(arguments + count, rest, sizeof rest);
  return launch(node, node->functions[variant], tokens, batch, stream, arguments);
}

/* ---- what ONNX Runtime asks about an op ---- */

Status* spa_gpu_infer_shape(const CustomOp* self, void* context) {
  const GpuInfo* g = ((const GpuOp*)(const void*)self)->info;
  const void* attribute;
  void* x;
  int64_t dims[MAX_RANK], n = 0;
  const char* names[MAX_RANK];
  size_t rank, got;
  Status* status = ShapeInfer_GetAttribute(context, "n", &attribute);
  if (!status) status = ReadOpAttr(attribute, ATTRIBUTE_INT, &n, sizeof n, &got);
  if (status) return ReleaseStatus(status), NULL; /* creation says what is wrong */
  TRY(ShapeInfer_GetInputTypeShape(context, 0, &x)); /* borrowed */
  TRY(GetDimensionsCount(x, &rank));
  if (rank < (g->layout == GPU_ROWS ? 1u : 3u) || rank > MAX_RANK || n < 1) return NULL; /* unknown shape: leave the output unknown */
  TRY(GetDimensions(x, dims, rank));
  TRY(GetSymbolicDimensions(x, names, rank));
  size_t axis = g->layout == GPU_ROWS ? rank - 1 : 1;
  dims[axis] = n;
  names[axis] = "";
  return spa_set_shape(context, g->type, 0, dims, names, rank);
}

const char* spa_gpu_name(const CustomOp* op) { return ((const GpuOp*)(const void*)op)->info->name; }
const char* spa_gpu_provider(const CustomOp* op) { return (void)op, "CUDAExecutionProvider"; }
const char* spa_gpu_provider_cpu(const CustomOp* op) { return (void)op, "CPUExecutionProvider"; }

size_t spa_gpu_input_count(const CustomOp* op) {
  const GpuInfo* g = ((const GpuOp*)(const void*)op)->info;
  return (size_t)(2 + !!g->residual + g->array_count);
}

int spa_gpu_input_type(const CustomOp* op, size_t index) {
  const GpuInfo* g = ((const GpuOp*)(const void*)op)->info;
  size_t first = g->residual ? 2 : 1;
  if (index < first) return g->type;
  return index - first < (size_t)g->array_count ? g->arrays[index - first].type : ELEMENT_FLOAT;
}

int spa_gpu_output_type(const CustomOp* op, size_t index) {
  return (void)index, ((const GpuOp*)(const void*)op)->info->type;
}
size_t spa_gpu_output_count(const CustomOp* op) { return (void)op, 1; }
