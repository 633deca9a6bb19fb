/* NVIDIA's driver, found when the first session asks for it: the library loads where there is none. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "gpu.h"

#define LIBRARY "libcuda.so.1"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static GpuDriver driver;
static int started;

void spa_gpu_lock(void) { pthread_mutex_lock(&lock); }
void spa_gpu_unlock(void) { pthread_mutex_unlock(&lock); }

/* cuda.h renames functions whose arguments have changed. */
static const struct {
  const char* name;
  size_t at;
} entries[] = {
    {"cuInit", offsetof(GpuDriver, cuInit)},
    {"cuDriverGetVersion", offsetof(GpuDriver, cuDriverGetVersion)},
    {"cuGetErrorName", offsetof(GpuDriver, cuGetErrorName)},
    {"cuGetErrorString", offsetof(GpuDriver, cuGetErrorString)},
    {"cuDeviceGet", offsetof(GpuDriver, cuDeviceGet)},
    {"cuDeviceGetName", offsetof(GpuDriver, cuDeviceGetName)},
    {"cuDeviceGetAttribute", offsetof(GpuDriver, cuDeviceGetAttribute)},
    {"cuDevicePrimaryCtxRetain", offsetof(GpuDriver, cuDevicePrimaryCtxRetain)},
    {"cuDevicePrimaryCtxRelease_v2", offsetof(GpuDriver, cuDevicePrimaryCtxRelease)},
    {"cuCtxGetCurrent", offsetof(GpuDriver, cuCtxGetCurrent)},
    {"cuCtxPushCurrent_v2", offsetof(GpuDriver, cuCtxPushCurrent)},
    {"cuCtxPopCurrent_v2", offsetof(GpuDriver, cuCtxPopCurrent)},
    {"cuMemcpyDtoH_v2", offsetof(GpuDriver, cuMemcpyDtoH)},
    {"cuModuleLoadDataEx", offsetof(GpuDriver, cuModuleLoadDataEx)},
    {"cuModuleUnload", offsetof(GpuDriver, cuModuleUnload)},
    {"cuModuleGetFunction", offsetof(GpuDriver, cuModuleGetFunction)},
    {"cuFuncGetAttribute", offsetof(GpuDriver, cuFuncGetAttribute)},
    {"cuFuncSetAttribute", offsetof(GpuDriver, cuFuncSetAttribute)},
    {"cuLaunchKernel", offsetof(GpuDriver, cuLaunchKernel)},
};

int spa_gpu_failed(const GpuDriver* d, const char* function, int result, char words[GPU_WORDS]) {
  const char *name = NULL, *text = NULL;
  if (d->cuGetErrorName(result, &name) || !name) name = "an unknown error";
  if (d->cuGetErrorString(result, &text) || !text) text = "the driver has no words for it";
  snprintf(words, GPU_WORDS, "%s: %d %s (%s)", function, result, name, text);
  return result;
}

/* A failure is not remembered: a session that is made later may find what was missing. */
static int start(char words[GPU_WORDS]) {
  void* library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    snprintf(words, GPU_WORDS, "NVIDIA's driver cannot be loaded: %.300s", why ? why : LIBRARY);
    return 0;
  }
  /* It is never closed: ONNX Runtime's provider uses the same one, and functions of it stay in use. */
  for (size_t i = 0; i < sizeof entries / sizeof *entries; ++i) {
    void* function = dlsym(library, entries[i].name);
    if (!function) {
      snprintf(words, GPU_WORDS, "NVIDIA's driver is too old: " LIBRARY " has no %s", entries[i].name);
      return 0;
    }
    memcpy((char*)&driver + entries[i].at, &function, sizeof function);
  }
  int result = driver.cuInit(0);
  return result ? spa_gpu_failed(&driver, "cuInit", result, words), 0 : 1;
}

const GpuDriver* spa_gpu_driver(char words[GPU_WORDS]) {
  spa_gpu_lock();
  if (!started) started = start(words);
  int there = started;
  spa_gpu_unlock();
  return there ? &driver : NULL;
}
