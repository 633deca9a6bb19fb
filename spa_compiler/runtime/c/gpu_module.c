/* Kernels in the memory of GPUs: each is loaded once for each GPU, when the first node is made that launches it, and goes with
 * the last one. Nothing is loaded in a call: a call may be recorded into a CUDA graph, which forbids it. */
#include <stdio.h>
#include <stdlib.h>

#include "gpu.h"

static GpuFunction* loaded; /* under spa_gpu_lock */

/* The code to load: that for the newest architecture with the GPU's major version that is not newer than the GPU; else PTX. */
static const GpuCode* choose(const GpuKernel* kernel, int major, int minor) {
  const GpuCode* best = NULL;
  for (int i = 0; i < kernel->code_count; ++i) {
    const GpuCode* c = kernel->codes + i;
    int older = c->major < major || (c->major == major && c->minor <= minor), same = c->major == major && c->minor == minor;
    if (c->exact ? !same : c->ptx ? !older : c->major != major || c->minor > minor) continue;
    int version = c->major * 100 + c->minor, best_version = best ? best->major * 100 + best->minor : 0;
    if (!best || (best->ptx && !c->ptx) || (best->ptx == c->ptx && (version > best_version || (version == best_version && c->exact))))
      best = c;
  }
  return best;
}

static int load(const GpuDriver* d, const GpuCode* code, GpuFunction* f, char words[GPU_WORDS]) {
  char log[256] = "";
  int options[] = {5, 6}; /* CU_JIT_ERROR_LOG_BUFFER, .._SIZE_BYTES */
  void* values[] = {log, (void*)(uintptr_t)(sizeof log - 1)};
  int result = d->cuModuleLoadDataEx(&f->module, code->image, 2, options, values), version = 0, threads = 0;
  if (result) {
    char why[GPU_WORDS];
    spa_gpu_failed(d, "cuModuleLoadDataEx", result, why);
    d->cuDriverGetVersion(&version);
    snprintf(words, GPU_WORDS, "%.160s, for the %s of %s; the driver is one for CUDA %d.%d. %.120s", why,
             code->ptx ? "PTX" : "code", code->arch, version / 1000, version % 1000 / 10, log);
    f->module = NULL;
    return 0;
  }
  if ((result = d->cuModuleGetFunction(&f->function, f->module, f->kernel->name)))
    return spa_gpu_failed(d, "cuModuleGetFunction", result, words), 0;
  /* A driver that loads lazily has loaded it now: cuModuleGetFunction makes it (CUDA programming guide, "Lazy loading"). */
  if ((result = d->cuFuncGetAttribute(&threads, GPU_FUNCTION_THREADS, f->function)))
    return spa_gpu_failed(d, "cuFuncGetAttribute", result, words), 0;
  if (threads < f->kernel->threads) {
    snprintf(words, GPU_WORDS, "a block of %s can have %d threads on this GPU, not %d", f->kernel->name, threads,
             f->kernel->threads);
    return 0;
  }
  if (f->kernel->shared_bytes <= GPU_SHARED_ALWAYS) return 1;
  if ((result = d->cuFuncSetAttribute(f->function, GPU_FUNCTION_SHARED, f->kernel->shared_bytes)))
    return spa_gpu_failed(d, "cuFuncSetAttribute", result, words), 0;
  return 1;
}

/* With the GPU's primary context, which ONNX Runtime's provider works in, too. */
static int place(const GpuDriver* d, GpuFunction* f, const char* archs, char words[GPU_WORDS]) {
  int handle, major = 0, minor = 0, shared = 0, result;
  char name[64] = "";
  if ((result = d->cuDeviceGet(&handle, f->device))) return spa_gpu_failed(d, "cuDeviceGet", result, words), 0;
  if ((result = d->cuDeviceGetAttribute(&major, GPU_ATTRIBUTE_MAJOR, handle)) ||
      (result = d->cuDeviceGetAttribute(&minor, GPU_ATTRIBUTE_MINOR, handle)) ||
      (result = d->cuDeviceGetAttribute(&shared, GPU_ATTRIBUTE_SHARED, handle)))
    return spa_gpu_failed(d, "cuDeviceGetAttribute", result, words), 0;
  const GpuCode* code = choose(f->kernel, major, minor);
  if (!code) {
    d->cuDeviceGetName(name, sizeof name, handle);
    snprintf(words, GPU_WORDS,
             "this GPU (%s) is an sm_%d%d, and kernels.so was compiled for %s. Compile the model with --target cuda:sm_%d%d, "
             "or load portable.onnx", name, major, minor, archs, major, minor);
    return 0;
  }
  if (f->kernel->shared_bytes > shared) {
    snprintf(words, GPU_WORDS, "%s needs %d bytes of shared memory, and a block of this GPU (sm_%d%d) has %d",
             f->kernel->name, f->kernel->shared_bytes, major, minor, shared);
    return 0;
  }
  if ((result = d->cuDevicePrimaryCtxRetain(&f->context, handle)))
    return spa_gpu_failed(d, "cuDevicePrimaryCtxRetain", result, words), 0;
  if ((result = d->cuCtxPushCurrent(f->context))) {
    spa_gpu_failed(d, "cuCtxPushCurrent", result, words);
  } else {
    void* popped;
    int there = load(d, code, f, words);
    if (!there && f->module) d->cuModuleUnload(f->module);
    d->cuCtxPopCurrent(&popped);
    if (there) return 1;
  }
  d->cuDevicePrimaryCtxRelease(handle);
  return 0;
}

GpuFunction* spa_gpu_acquire(const GpuDriver* d, const GpuKernel* kernel, int device, const char* archs,
                             char words[GPU_WORDS]) {
  spa_gpu_lock();
  GpuFunction* f = loaded;
  while (f && (f->kernel != kernel || f->device != device)) f = f->next;
  if (!f) {
    f = calloc(1, sizeof *f);
    if (!f) {
      snprintf(words, GPU_WORDS, "out of memory");
    } else {
      f->kernel = kernel;
      f->device = device;
      if (place(d, f, archs, words)) {
        f->next = loaded;
        loaded = f;
      } else {
        free(f);
        f = NULL;
      }
    }
  }
  if (f) ++f->uses;
  spa_gpu_unlock();
  return f;
}

/* At the end of a process the driver may have gone before: then these calls fail, and nobody is left to tell. */
void spa_gpu_release(const GpuDriver* d, GpuFunction* f) {
  spa_gpu_lock();
  if (--f->uses == 0) {
    GpuFunction** at = &loaded;
    void* popped;
    int handle;
    while (*at != f) at = &(*at)->next;
    *at = f->next;
    if (!d->cuCtxPushCurrent(f->context)) {
      d->cuModuleUnload(f->module);
      d->cuCtxPopCurrent(&popped);
    }
    if (!d->cuDeviceGet(&handle, f->device)) d->cuDevicePrimaryCtxRelease(handle);
    free(f);
  }
  spa_gpu_unlock();
}
