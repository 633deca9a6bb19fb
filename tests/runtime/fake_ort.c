/* fake_ort RECORDS: the part of ONNX Runtime that the C side of a kernels.so calls, and a program that is linked with it.
 *
 * Registers the regions, makes a node for each record, runs it and compares its outputs with those of the record
 * (tests/runtime/emulated.py writes them). One thread; items of a parallel step run from the last to the first, as none
 * may depend on another. Prints the level of the machine and the number of checks; exits with 1 at the first difference.
 *
 * A record: name, i32 inputs, i32 outputs, the inputs and outputs as tensors: i32 type, i32 rank, i64 dims, values.
 * A name: i32 length, bytes. The file: i32 records, f64 tolerance, the records; little-endian. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "ort_abi.h"

enum { MOST = 64, RANK = 8 };

typedef struct {
  int32_t type, rank;
  int64_t dims[RANK];
  void* data;
} Tensor;

typedef struct {
  char name[128];
  int32_t inputs, outputs;
  Tensor input[MOST], wanted[MOST], got[MOST];
} Record;

static const CustomOp* ops[MOST];
static int op_count;

static void die(const char* what, const char* which) {
  printf("%s: %s\n", which, what);
  exit(1);
}

static int64_t count_of(const Tensor* t) {
  int64_t n = 1;
  for (int i = 0; i < t->rank; ++i) n *= t->dims[i];
  return n;
}

/* ---- the API ---- */

static Status* create_status(int code, const char* text) {
  static char message[1024];
  snprintf(message, sizeof message, "%d %s", code, text);
  return message;
}
static Status* create_domain(const char* name, void** domain) { return *domain = (void*)(uintptr_t)name, NULL; }
static Status* add_op(void* domain, const void* op) { return (void)domain, ops[op_count++] = op, NULL; }
static Status* add_domain(void* options, void* domain) { return (void)options, (void)domain, NULL; }
static Status* data_of(const void* value, void* out) { return *(void**)out = ((const Tensor*)value)->data, NULL; }
static Status* rank_of(const void* t, size_t* rank) { return *rank = (size_t)((const Tensor*)t)->rank, NULL; }
static Status* dims_of(const void* t, int64_t* dims, size_t rank) {
  return memcpy(dims, ((const Tensor*)t)->dims, rank * sizeof *dims), NULL;
}
static Status* shape_of(const void* value, void** info) { return *info = (void*)(uintptr_t)value, NULL; }
static void release(void* anything) { (void)anything; }
static Status* site_of(const void* info, const char* name, char* out, size_t* size) {
  (void)info, (void)name;
  *size = sizeof "emulated";
  if (out) memcpy(out, "emulated", *size);
  return NULL;
}
static Status* constant(const void* info, size_t index, int* is_constant, const void** value) {
  return *is_constant = 1, *value = &((const Record*)info)->input[index], NULL;
}
static Status* input_of(const void* context, size_t index, const void** value) {
  return *value = &((const Record*)context)->input[index], NULL;
}
static Status* output_of(void* context, size_t index, const int64_t* dims, size_t rank, void** value) {
  Tensor* t = &((Record*)context)->got[index];
  t->rank = (int32_t)rank;
  memcpy(t->dims, dims, rank * sizeof *dims);
  t->data = malloc((size_t)count_of(t) * sizeof(float) + 1);
  return *value = t, NULL;
}
static Status* config(void* options, const char* key, const char* value) {
  return (void)options, (void)key, (void)value, NULL;
}
static Status* parallel(const void* context, void (*step)(void*, size_t), size_t items, size_t batches, void* user) {
  (void)context, (void)batches;
  while (items-- > 0) step(user, items);
  return NULL;
}
static void* take(Allocator* self, size_t bytes) { return (void)self, malloc(bytes); }
static void give(Allocator* self, void* block) { (void)self, free(block); }
static Allocator allocator = {SPA_API_VERSION, take, give};
static Status* allocator_of(const void* info, int kind, Allocator** out) {
  return (void)info, (void)kind, *out = &allocator, NULL;
}

static const void* table[300] = {
    [0] = create_status, [26] = create_domain, [27] = add_op,    [28] = add_domain, [51] = data_of,   [61] = rank_of,
    [62] = dims_of,      [65] = shape_of,      [87] = site_of,   [90] = input_of,   [91] = output_of, [93] = release,
    [99] = release,      [130] = config,       [132] = release,  [249] = constant,  [274] = parallel, [278] = allocator_of,
};
static Api get_api(uint32_t version) { return version <= SPA_API_VERSION ? table : NULL; }
static const char* version(void) { return "1.18.0"; }

/* ---- records ---- */

static void get(FILE* file, void* to, size_t bytes) {
  if (fread(to, 1, bytes, file) != bytes) die("the file of records is too short", "records");
}

static void read_tensor(FILE* file, Tensor* t) {
  get(file, &t->type, sizeof t->type);
  get(file, &t->rank, sizeof t->rank);
  get(file, t->dims, sizeof *t->dims * (size_t)t->rank);
  size_t bytes = (size_t)count_of(t) * (t->type == ELEMENT_UINT16 ? 2 : 4);
  t->data = malloc(bytes + 1);
  get(file, t->data, bytes);
}

static int read_record(FILE* file, Record* r) {
  int32_t length;
  memset(r, 0, sizeof *r);
  get(file, &length, sizeof length);
  get(file, r->name, (size_t)length);
  get(file, &r->inputs, sizeof r->inputs);
  get(file, &r->outputs, sizeof r->outputs);
  for (int i = 0; i < r->inputs; ++i) read_tensor(file, &r->input[i]);
  for (int i = 0; i < r->outputs; ++i) read_tensor(file, &r->wanted[i]);
  return r->outputs;
}

static void compare(const Record* r, double tolerance) {
  for (int i = 0; i < r->outputs; ++i) {
    const Tensor *a = &r->got[i], *b = &r->wanted[i];
    const float *got = a->data, *wanted = b->data;
    double largest = 1e-30, error = 0;
    if (a->rank != b->rank || memcmp(a->dims, b->dims, sizeof *a->dims * (size_t)a->rank)) die("another shape", r->name);
    for (int64_t k = 0; k < count_of(b); ++k) {
      double off = fabs((double)got[k] - (double)wanted[k]);
      if (!(off <= error)) error = off; /* NaN too */
      if (fabs((double)wanted[k]) > largest) largest = fabs((double)wanted[k]);
    }
    if (!(error <= tolerance * largest)) {
      printf("%s: output %d is off by %g at a magnitude of %g\n", r->name, i, error, largest);
      exit(1);
    }
  }
}

static void release_tensors(Record* r) {
  for (int i = 0; i < r->inputs; ++i) free(r->input[i].data);
  for (int i = 0; i < r->outputs; ++i) free(r->wanted[i].data), free(r->got[i].data);
}

Status* RegisterCustomOps(void* options, const ApiBase* base);

int main(int count, char** arguments) {
  const ApiBase base = {get_api, version};
  static Record r;
  int32_t records, checks = 0;
  double tolerance;
  Status* status = RegisterCustomOps(NULL, &base);
  if (status) die(status, "registration");
  FILE* file = count == 2 ? fopen(arguments[1], "rb") : NULL;
  if (!file) die("cannot be read", count == 2 ? arguments[1] : "one argument");
  get(file, &records, sizeof records);
  get(file, &tolerance, sizeof tolerance);
  while (records-- > 0) {
    void* kernel;
    checks += read_record(file, &r);
    const CustomOp* op = NULL;
    for (int i = 0; i < op_count; ++i)
      if (!strncmp(ops[i]->GetName(ops[i]), r.name, strlen(ops[i]->GetName(ops[i])))) op = ops[i];
    if (!op) die("there is no such op", r.name);
    if ((size_t)r.inputs != op->GetInputTypeCount(op)) die("another number of inputs", r.name);
    for (int i = 0; i < r.inputs; ++i)
      if (op->GetInputType(op, (size_t)i) != r.input[i].type) die("an input of another type", r.name);
    if ((status = op->CreateKernelV2(op, table, &r, &kernel))) die(status, r.name);
    if ((status = op->KernelComputeV2(kernel, &r))) die(status, r.name);
    op->KernelDestroy(kernel);
    compare(&r, tolerance);
    release_tensors(&r);
  }
  printf("level %d, %d checks\n", spa_isa_level(), checks);
  return 0;
}
