/* A node for ONNX Runtime's CUDA provider: one packed weight, and the kernels that multiply it.
 *
 *   y = act(W x + b [+ residual])        inputs: x, the residual, the packed arrays, the bias; all in the GPU's memory
 *
 * gpu_driver.c finds NVIDIA's driver, gpu_module.c loads kernels into a GPU, gpu_check.c looks at what kernels index with,
 * gpu_node.c is the life of a node. spa_compiler/kernels/cuda/form.py says how kernels are called, and
 * spa_compiler/runtime/gpu.py writes the tables.
 */
#ifndef SPA_GPU_H
#define SPA_GPU_H
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "ort_abi.h"

enum { GPU_ARRAYS = 12, GPU_RANK = 3, GPU_COUNTS = 4, GPU_VARIANTS = 16 }; /* at most */
enum { GPU_WORDS = 448 };                                                  /* room for why something failed */

/* ---- tables ---- */

typedef struct { /* times x ceil(n / rows) x ceil(k / columns) x counts[count] + plus; 0, and a count < 0: not a factor */
  int64_t times, rows, columns, plus;
  int count;
} GpuExtent;

/* What the integers (v >> shift) & mask of an array may be, with `bound` an extent:
 *   BELOW        0 .. bound - 1
 *   OFFSETS      from 0 to bound, none smaller than the one before
 *   PERMUTATION  0 .. bound - 1, each once */
enum { GPU_ANY, GPU_BELOW, GPU_OFFSETS, GPU_PERMUTATION };
typedef struct {
  const char* name;
  int type, rank; /* type: ONNXTensorElementDataType */
  GpuExtent dims[GPU_RANK];
  int check;
  unsigned shift;
  uint64_t mask;
  GpuExtent bound;
} GpuArray;

typedef struct { /* machine code for one architecture, or PTX, which the driver compiles for newer ones */
  const char* arch; /* "sm_90" */
  int major, minor, exact, ptx; /* exact: for no other architecture, as sm_90a */
  const unsigned char* image;
} GpuCode;

typedef struct {
  const char* name;
  int threads, tile_tokens, tile_rows, shared_bytes; /* of dynamic shared memory */
  const GpuCode* codes;
  int code_count;
} GpuKernel;

/* ROWS [.., k]; PLANES [batch, k, pixels..]; PIXEL [batch, k, 1..], which lie in memory as rows: their kernels run */
enum { GPU_ROWS, GPU_PLANES, GPU_PIXEL };

typedef struct { /* the first whose most_tokens are enough is launched */
  int64_t most_tokens;
  const GpuKernel* kernel;
} GpuVariant;

typedef struct {
  const char* name;
  const char* archs; /* "sm_80, sm_90 and newer" */
  int type;          /* of x, the residual and y */
  int layout;        /* of x, the residual and y */
  int residual, bounded; /* bounded: the activation has bounds, attributes of the node */
  const GpuArray* arrays;
  const GpuVariant* variants;
  int array_count, variant_count;
} GpuInfo;

typedef struct {
  CustomOp op; /* first: ONNX Runtime hands its address back */
  const GpuInfo* info;
} GpuOp;

/* Written by the compiler, per artifact: an op for the CUDA provider, and one for the CPU, which says what is missing. */
extern const GpuOp* const spa_gpu_ops;
extern const int spa_gpu_op_count, spa_for_gpus;

/* ---- gpu_driver.c ---- */

/* Entries of cuda.h, with its numbers for enums, as CUDA 13.0 has them; every function returns a CUresult, 0 is success. */
typedef struct {
  int (*cuInit)(unsigned);
  int (*cuDriverGetVersion)(int*);
  int (*cuGetErrorName)(int, const char**);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetName)(char*, int, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuDevicePrimaryCtxRelease)(int);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxPushCurrent)(void*);
  int (*cuCtxPopCurrent)(void**);
  int (*cuMemcpyDtoH)(void*, uint64_t, size_t);
  int (*cuModuleLoadDataEx)(void**, const void*, unsigned, int*, void**);
  int (*cuModuleUnload)(void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuFuncGetAttribute)(int*, int, void*);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
} GpuDriver;
enum { GPU_ATTRIBUTE_MAJOR = 75, GPU_ATTRIBUTE_MINOR = 76, GPU_ATTRIBUTE_SHARED = 97 }; /* SHARED: a block may opt in to */
enum { GPU_FUNCTION_THREADS = 0, GPU_FUNCTION_SHARED = 8 };
enum { GPU_SHARED_ALWAYS = 48 << 10 }; /* bytes that every launch may have */

/* The driver, started; NULL, and why in `words`. Any number of threads may call it. */
extern const GpuDriver* spa_gpu_driver(char words[GPU_WORDS]);
/* "cuModuleGetFunction: CUDA_ERROR_NOT_FOUND (named symbol not found)" into `words`; returns `result`. */
extern int spa_gpu_failed(const GpuDriver*, const char* function, int result, char words[GPU_WORDS]);
extern void spa_gpu_lock(void), spa_gpu_unlock(void); /* of all that this library keeps for the process */

/* ---- gpu_module.c ---- */

typedef struct GpuFunction GpuFunction;
struct GpuFunction { /* a kernel in a GPU, shared by all nodes that launch it */
  const GpuKernel* kernel;
  int device, uses;
  void *context, *module, *function;
  GpuFunction* next;
};

/* Loads a kernel, once for each GPU; NULL, and why in `words`. Every one that was acquired must be released. */
extern GpuFunction* spa_gpu_acquire(const GpuDriver*, const GpuKernel*, int device, const char* archs, char words[GPU_WORDS]);
extern void spa_gpu_release(const GpuDriver*, GpuFunction*);

/* ---- gpu_check.c ---- */

typedef struct { /* sizes that arrays agree about; < 0: not seen yet */
  int64_t n, k, counts[GPU_COUNTS];
} GpuSizes;

/* Whether `dims` are those of `array`; a count that is not known yet follows from them. 0, and why in `words`. */
extern int spa_gpu_fits(const GpuArray*, GpuSizes*, const int64_t* dims, char words[GPU_WORDS]);
/* Whether the integers of `array`, `size` of them at `data`, are what kernels may index with. */
extern int spa_gpu_sound(const GpuArray*, const GpuSizes*, const void* data, int64_t size, char words[GPU_WORDS]);
extern size_t spa_element_bytes(int type); /* 0: not a type of packed arrays */

/* ---- gpu_node.c ---- */

extern const char* spa_gpu_name(const CustomOp*);
extern const char *spa_gpu_provider(const CustomOp*), *spa_gpu_provider_cpu(const CustomOp*);
extern int spa_gpu_input_type(const CustomOp*, size_t), spa_gpu_output_type(const CustomOp*, size_t);
extern size_t spa_gpu_input_count(const CustomOp*), spa_gpu_output_count(const CustomOp*);
extern int spa_zero(const CustomOp*, size_t), spa_one(const CustomOp*);
extern Status *spa_gpu_create(const CustomOp*, Api, const void*, void**), *spa_gpu_compute(void*, void*);
extern Status *spa_gpu_create_cpu(const CustomOp*, Api, const void*, void**);
extern Status* spa_gpu_infer_shape(const CustomOp*, void*);
extern void spa_gpu_destroy(void*);
#define SPA_GPU_OP(provider, create)                                                                          \
  {                                                                                                           \
    .version = SPA_API_VERSION, .GetName = spa_gpu_name, .GetExecutionProviderType = provider,                \
    .GetInputType = spa_gpu_input_type, .GetInputTypeCount = spa_gpu_input_count,                             \
    .GetOutputType = spa_gpu_output_type, .GetOutputTypeCount = spa_gpu_output_count,                         \
    .KernelDestroy = spa_gpu_destroy, .GetInputCharacteristic = spa_zero, .GetOutputCharacteristic = spa_zero, \
    .GetInputMemoryType = spa_zero, .GetVariadicInputMinArity = spa_one, .GetVariadicInputHomogeneity = spa_one, \
    .GetVariadicOutputMinArity = spa_one, .GetVariadicOutputHomogeneity = spa_one, .CreateKernelV2 = create,  \
    .KernelComputeV2 = spa_gpu_compute, .InferOutputShape = spa_gpu_infer_shape, .GetStartVersion = spa_one,  \
    .GetEndVersion = spa_one                                                                                  \
  }

#endif
