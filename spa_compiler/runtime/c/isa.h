#ifndef SPA_ISA_H
#define SPA_ISA_H
#include <stdint.h>
/* The x86-64 level (1 to 4, System V psABI) that CPU and operating system run; 1, the base, on other processors. */
int spa_isa_level(void);
/* On x86-64, the same from register values: CPUID 1 ECX, CPUID 7 EBX, CPUID 0x80000001 ECX, XCR0. */
int spa_isa_level_of(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t extended_ecx, uint32_t xcr0);
#endif
