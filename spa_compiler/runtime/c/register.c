/* RegisterCustomOps: the one symbol that kernels.so exports. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "gpu.h"
#include "isa.h"
#include "region.h"

Api spa_api;

static Status* refuse(const char* format, const char* word, int number) {
  char message[192];
  snprintf(message, sizeof message, format, number, word);
  return CreateStatus(CODE_NOT_IMPLEMENTED, message);
}

/* The level to look for: this machine's, or SPA_ISA_LEVEL, if that is set to a lower one. */
static int highest_level(void) {
  const char* wanted = getenv("SPA_ISA_LEVEL");
  int level = spa_isa_level(), asked = wanted && *wanted && !wanted[1] ? *wanted - '0' : 0;
  return asked > 0 && asked < level ? asked : level;
}

Status* RegisterCustomOps(void* options, const ApiBase* base);
Status* RegisterCustomOps(void* options, const ApiBase* base) {
  spa_api = base->GetApi(SPA_API_VERSION);
  if (!spa_api) {
    spa_api = base->GetApi(1); /* enough to report the error */
    return spa_api ? refuse("ai.spa: this kernels.so needs onnxruntime 1.%d or newer, this is %.32s. Install a newer "
                            "one, or load portable.onnx, which needs no library",
                            base->GetVersionString(), SPA_API_VERSION)
                   : NULL;
  }
  const Table* table = spa_tables;
  const Table* lowest = spa_tables + spa_table_count - 1;
  while (table < lowest && table->level > highest_level()) ++table;
  if (table->level > highest_level())
    return refuse("ai.spa: this kernels.so was compiled for x86-64-v%d%s, which this machine does not run. Compile the "
                  "model on this machine, or load portable.onnx, which runs anywhere",
                  table->level == 4 ? " (AVX-512)" : table->level == 3 ? " (AVX2)" : "", table->level);

  /* SkipLayerNormalization against Add + LayerNormalization on a CPU: faster in 1.18, up to eight times slower in 1.31. */
  int minor = 0;
  if (!spa_for_gpus && sscanf(base->GetVersionString(), "1.%d", &minor) == 1 && minor > SPA_API_VERSION)
    TRY(AddSessionConfigEntry(options, "optimization.disable_specified_optimizers", "SkipLayerNormFusion"));

  /* One domain for the life of the process: sessions keep a pointer to it. */
  static _Atomic(void*) shared;
  void *domain = atomic_load(&shared), *expected = NULL;
  if (!domain) {
    TRY(CreateCustomOpDomain("ai.spa", &domain));
    for (int i = 0; i < spa_region_count; ++i) TRY(CustomOpDomain_Add(domain, &table->regions[i].op));
    for (int i = 0; i < spa_gpu_op_count; ++i) TRY(CustomOpDomain_Add(domain, &spa_gpu_ops[i].op));
    if (!atomic_compare_exchange_strong(&shared, &expected, domain)) domain = expected;
  }
  return AddCustomOpDomain(options, domain);
}
