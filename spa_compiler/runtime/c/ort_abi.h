/* The part of ONNX Runtime's C ABI in use, at API version 18 (onnxruntime 1.18).
 *
 * The API is a table of function pointers that only ever grows, so an entry is reached by its index and one binary runs
 * in every later release. Indices and field order: onnxruntime_c_api.h, struct OrtApi and struct OrtCustomOp.
 */
#ifndef SPA_ORT_ABI_H
#define SPA_ORT_ABI_H
#include <stddef.h>
#include <stdint.h>

enum { SPA_API_VERSION = 18 };
typedef void Status; /* OrtStatus; NULL: success */
typedef const void* const* Api;
typedef struct {
  Api (*GetApi)(uint32_t);
  const char* (*GetVersionString)(void);
} ApiBase;
typedef struct Allocator {
  uint32_t version;
  void* (*Alloc)(struct Allocator*, size_t);
  void (*Free)(struct Allocator*, void*);
} Allocator;

enum { ELEMENT_FLOAT = 1, ELEMENT_UINT8, ELEMENT_INT8, ELEMENT_UINT16, ELEMENT_INT16, ELEMENT_INT32, ELEMENT_INT64,
       ELEMENT_FLOAT16 = 10, ELEMENT_UINT32 = 12, ELEMENT_BFLOAT16 = 16 };      /* ONNXTensorElementDataType */
enum { CODE_FAIL = 1, CODE_INVALID_ARGUMENT = 2, CODE_NOT_IMPLEMENTED = 9 };    /* OrtErrorCode */

extern Api spa_api; /* set once, by RegisterCustomOps */
#define SPA_CALL(index, type) ((type)spa_api[index])
#define CreateStatus SPA_CALL(0, Status* (*)(int, const char*))
#define CreateCustomOpDomain SPA_CALL(26, Status* (*)(const char*, void**))
#define CustomOpDomain_Add SPA_CALL(27, Status* (*)(void*, const void*))
#define AddCustomOpDomain SPA_CALL(28, Status* (*)(void*, void*))
#define GetTensorMutableData SPA_CALL(51, Status* (*)(const void*, void*))
#define CreateTensorTypeAndShapeInfo SPA_CALL(57, Status* (*)(void**))
#define SetTensorElementType SPA_CALL(58, Status* (*)(void*, int))
#define SetDimensions SPA_CALL(59, Status* (*)(void*, const int64_t*, size_t))
#define GetDimensionsCount SPA_CALL(61, Status* (*)(const void*, size_t*))
#define GetDimensions SPA_CALL(62, Status* (*)(const void*, int64_t*, size_t))
#define GetSymbolicDimensions SPA_CALL(63, Status* (*)(const void*, const char**, size_t))
#define GetTensorTypeAndShape SPA_CALL(65, Status* (*)(const void*, void**))
#define MemoryInfoGetId SPA_CALL(72, Status* (*)(const void*, int*))
#define KernelInfoGetAttribute_float SPA_CALL(85, Status* (*)(const void*, const char*, float*))
#define KernelInfoGetAttribute_int64 SPA_CALL(86, Status* (*)(const void*, const char*, int64_t*))
#define KernelInfoGetAttribute_string SPA_CALL(87, Status* (*)(const void*, const char*, char*, size_t*))
#define KernelContext_GetInput SPA_CALL(90, Status* (*)(const void*, size_t, const void**))
#define KernelContext_GetOutput SPA_CALL(91, Status* (*)(void*, size_t, const int64_t*, size_t, void**))
#define ReleaseStatus SPA_CALL(93, void (*)(Status*))
#define ReleaseTensorTypeAndShapeInfo SPA_CALL(99, void (*)(void*))
#define AddSessionConfigEntry SPA_CALL(130, Status* (*)(void*, const char*, const char*))
#define ReleaseAllocator SPA_CALL(132, void (*)(Allocator*))
#define KernelContext_GetGPUComputeStream SPA_CALL(193, Status* (*)(const void*, void**))
#define GetTensorMemoryInfo SPA_CALL(194, Status* (*)(const void*, const void**))
#define MemoryInfoGetDeviceType SPA_CALL(225, void (*)(const void*, int*))
#define KernelInfoGetConstantInput_tensor SPA_CALL(249, Status* (*)(const void*, size_t, int*, const void**))
#define ShapeInfer_GetInputTypeShape SPA_CALL(268, Status* (*)(const void*, size_t, void**))
#define ShapeInfer_GetAttribute SPA_CALL(269, Status* (*)(const void*, const char*, const void**))
#define ShapeInfer_SetOutputTypeShape SPA_CALL(270, Status* (*)(const void*, size_t, const void*))
#define SetSymbolicDimensions SPA_CALL(271, Status* (*)(void*, const char**, size_t))
#define ReadOpAttr SPA_CALL(272, Status* (*)(const void*, int, void*, size_t, size_t*))
#define KernelContext_ParallelFor \
  SPA_CALL(274, Status* (*)(const void*, void (*)(void*, size_t), size_t, size_t, void*))
#define KernelInfoGetAllocator SPA_CALL(278, Status* (*)(const void*, int, Allocator**))

typedef struct CustomOp CustomOp;
struct CustomOp { /* layout of version 18; the V2 functions are set, so the first generation stays NULL */
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, Api, const void*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, void*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, Api, const void*, void**);
  Status* (*KernelComputeV2)(void*, void*);
  Status* (*InferOutputShape)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

#define TRY(call)                  \
  do {                             \
    Status* status_ = (call);      \
    if (status_) return status_;   \
  } while (0)

#endif
