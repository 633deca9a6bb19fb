/* CPUID by hand: the link must not need a compiler's runtime library, and this file must run on any x86-64. */
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#define BIT(n) (UINT32_C(1) << (n))
/* v2: SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT; LAHF */
static const uint32_t V2_LEAF1 = BIT(0) | BIT(9) | BIT(13) | BIT(19) | BIT(20) | BIT(23), V2_EXTENDED = BIT(0);
/* v3: FMA MOVBE OSXSAVE AVX F16C; LZCNT; BMI1 AVX2 BMI2; the OS saves xmm and ymm */
static const uint32_t V3_LEAF1 = BIT(12) | BIT(22) | BIT(27) | BIT(28) | BIT(29), V3_EXTENDED = BIT(5);
static const uint32_t V3_LEAF7 = BIT(3) | BIT(5) | BIT(8), V3_XCR0 = 0x06;
/* v4: AVX512 F DQ CD BW VL; the OS saves opmask and zmm */
static const uint32_t V4_LEAF7 = BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31), V4_XCR0 = 0xe6;

static int has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

int spa_isa_level_of(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t extended_ecx, uint32_t xcr0) {
  if (!has(leaf1_ecx, V2_LEAF1) || !has(extended_ecx, V2_EXTENDED)) return 1;
  if (!has(leaf1_ecx, V3_LEAF1) || !has(leaf7_ebx, V3_LEAF7) || !has(extended_ecx, V3_EXTENDED) || !has(xcr0, V3_XCR0))
    return 2;
  return has(leaf7_ebx, V4_LEAF7) && has(xcr0, V4_XCR0) ? 4 : 3;
}

int spa_isa_level(void) {
  uint32_t a, b, c, d, leaf1 = 0, leaf7 = 0, extended = 0, xcr0 = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) leaf1 = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7 = b;
  if (__get_cpuid(0x80000001u, &a, &b, &c, &d)) extended = c;
  if (has(leaf1, BIT(27))) __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(d) : "c"(0)); /* needs OSXSAVE */
  return spa_isa_level_of(leaf1, leaf7, extended, xcr0);
}
#else
int spa_isa_level(void) { return 1; } /* NEON is in the base of AArch64 */
#endif
