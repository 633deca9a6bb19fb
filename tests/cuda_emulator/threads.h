// A CUDA thread block on one CPU thread: every GPU thread is a fiber, and blocks run one after the other.
//
// What a GPU leaves open is decided by chance, from a seed, so that code that relies on it fails here:
//   - which thread goes on: any that is not waiting, anew whenever one waits;
//   - when an asynchronous copy lands: at once, or at the wait for it; until then its target is garbage;
//   - what shared memory starts with: garbage (NaN in every type).
// Two threads that touch the same shared memory, one of them writing, are a race unless __syncthreads() is between, or
// __syncwarp() where they are lanes of a warp. Nothing else orders memory: lanes that meet in an mma, ldmatrix or
// shuffle only execute it together (PTX ISA, "bar.warp.sync" guarantees the order of accesses, they do not), and an
// asynchronous copy writes until its own thread has waited for it ("cp.async.wait_group").
// Errors (races, misaligned vectors, addresses outside of the registered buffers, threads that wait for different
// things) end the launch with a message. No C++ library is used: building one takes longer than all tests.

#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

struct spa_dim3 {
  unsigned x, y, z;
};

enum { SPA_LANES = 32, SPA_MAX_THREADS = 1024, SPA_STACK = 128 << 10, SPA_COPIES = 256, SPA_BUFFERS = 32 };

enum spa_state { SPA_READY, SPA_AT_BARRIER, SPA_AT_WARP, SPA_DONE };

struct spa_copy {
  char* to;
  const char* from;
  int size, valid, group, landed;
};

// Who touched 2 bytes of shared memory last: a thread's number, how many barriers of the block and of its warp were
// behind it. Of readers, a warp's as -1 - warp where they are several of its lanes, SPA_MANY where of several warps.
struct spa_mark {
  int writer, write_block, write_warp;
  int reader, read_block, read_warp;
};
enum { SPA_MANY = -1000, SPA_PENDING = 0x7fffffff };  // PENDING: an asynchronous copy that nobody has waited for

struct spa_thread {
  void* stack_pointer;
  char* stack;
  spa_dim3 index;
  int number, state, barrier;
  int block_barriers, warp_barriers;  // behind it
  // asynchronous copies
  spa_copy copies[SPA_COPIES];
  int n_copies, group;
  // what it brings to an operation of its warp
  const char* operation;
  const void* in[4];
  void* out;
  int argument;
};

typedef void (*spa_warp_function)(spa_thread* lanes);

static struct {
  spa_thread* threads;
  int n_threads, n_live;
  spa_thread* current;
  void* scheduler;
  int ready[SPA_MAX_THREADS], n_ready;
  int at_warp[SPA_MAX_THREADS / SPA_LANES];
  int at_barrier[16];
  uint64_t random;
  char* shared;
  int shared_bytes;
  spa_mark* marks;
  int barriers;  // of all blocks so far: marks of blocks that have ended are older than all that comes
  struct {
    const char *start, *end;
  } buffers[SPA_BUFFERS];
  int n_buffers;
  void (*entry)(void);
  char message[512];
} spa_gpu;

static spa_dim3 spa_block, spa_grid, spa_block_size;

static uint32_t spa_chance(uint32_t below) {  // xorshift64*
  spa_gpu.random ^= spa_gpu.random >> 12, spa_gpu.random ^= spa_gpu.random << 25,
      spa_gpu.random ^= spa_gpu.random >> 27;
  return (uint32_t)((spa_gpu.random * 2685821657736338717ull) >> 33) % below;
}

// Saves the registers that a callee keeps, and goes on where `to` was saved.
extern "C" void spa_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".type spa_switch, @function\n"
    "spa_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size spa_switch, . - spa_switch\n");

static void spa_yield() { spa_switch(&spa_gpu.current->stack_pointer, spa_gpu.scheduler); }

// Does not return: nobody goes on after an error.
__attribute__((noreturn, format(printf, 1, 2))) static void spa_fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int used = vsnprintf(spa_gpu.message, sizeof spa_gpu.message, format, arguments);
  va_end(arguments);
  if (spa_gpu.current && used < (int)sizeof spa_gpu.message) {
    snprintf(spa_gpu.message + used, sizeof spa_gpu.message - used, " (block %u %u %u, thread %d)", spa_block.x,
             spa_block.y, spa_block.z, spa_gpu.current->number);
  }
  spa_yield();
  abort();
}

static void spa_wake(spa_thread* thread) {
  thread->state = SPA_READY;
  spa_gpu.ready[spa_gpu.n_ready++] = thread->number;
}

static void spa_wake_barrier(int id) {
  spa_gpu.at_barrier[id] = 0;
  for (int i = 0; i < spa_gpu.n_threads; ++i) {
    spa_thread* thread = &spa_gpu.threads[i];
    if (thread->state == SPA_AT_BARRIER && thread->barrier == id) spa_wake(thread);
  }
}

// `count` threads meet at barrier `id`; 0: all of the block. One that has ended is missing, for simplicity's sake.
static void spa_barrier(int id, int count) {
  spa_gpu.at_barrier[id]++;
  spa_gpu.current->state = SPA_AT_BARRIER;
  spa_gpu.current->barrier = id;
  if (spa_gpu.at_barrier[id] == (count ? count : spa_gpu.n_threads)) spa_wake_barrier(id);
  spa_yield();
  int behind = ++spa_gpu.current->block_barriers;
  if (behind > spa_gpu.barriers) spa_gpu.barriers = behind;
}

// An operation that all lanes take part in: the last to come runs it for all.
static void spa_together(const char* operation, spa_warp_function run) {
  spa_thread* self = spa_gpu.current;
  int warp = self->number / SPA_LANES;
  spa_thread* lanes = &spa_gpu.threads[warp * SPA_LANES];
  self->operation = operation;
  self->state = SPA_AT_WARP;
  if (++spa_gpu.at_warp[warp] == SPA_LANES) {
    for (int i = 0; i < SPA_LANES; ++i) {
      if (strcmp(lanes[i].operation, operation)) {
        spa_fail("lanes of a warp do different things: %s and %s", operation, lanes[i].operation);
      }
    }
    run(lanes);
    spa_gpu.at_warp[warp] = 0;
    for (int i = 0; i < SPA_LANES; ++i) spa_wake(&lanes[i]);
  }
  spa_yield();
}

// Whether `size` bytes at `p` are aligned to `align` and lie in a registered buffer, in shared memory or on the
// thread's stack.
static void spa_check(const void* p, int size, int align, const char* what) {
  const char* at = (const char*)p;
  if ((uintptr_t)p % align) spa_fail("%s: address is no multiple of %d", what, align);
  if (!size) return;
  if (at >= spa_gpu.shared && at + size <= spa_gpu.shared + spa_gpu.shared_bytes) return;
  if (at >= spa_gpu.current->stack && at + size <= spa_gpu.current->stack + SPA_STACK) return;
  for (int i = 0; i < spa_gpu.n_buffers; ++i) {
    if (at >= spa_gpu.buffers[i].start && at + size <= spa_gpu.buffers[i].end) return;
  }
  const char* near = "";
  long off = 0, best = 1L << 40;
  for (int i = 0; i < spa_gpu.n_buffers; ++i) {
    long past = at + size - spa_gpu.buffers[i].end, before = spa_gpu.buffers[i].start - at;
    long out = past > before ? past : before;
    if (out < best) best = out, off = i, near = past > before ? "past the end" : "before the start";
  }
  spa_fail("%s: %d bytes outside of all buffers, %ld bytes %s of buffer %ld; shared memory from %ld of %d", what, size,
           best, near, off, (long)(at - spa_gpu.shared), spa_gpu.shared_bytes);
}

static void spa_check_shared(const void* p, int size, int align, const char* what) {
  spa_check(p, 0, align, what);
  const char* at = (const char*)p;
  if (at < spa_gpu.shared || at + size > spa_gpu.shared + spa_gpu.shared_bytes) {
    spa_fail("%s: %ld is outside of the %d bytes of shared memory", what, (long)(at - spa_gpu.shared),
             spa_gpu.shared_bytes);
  }
}

// ---- races ----

static void spa_race(long at, const char* what, int thread, const char* other, int by) {
  if (by <= SPA_MANY) spa_fail("race: shared byte %ld, %s by thread %d, %s by several warps", at, what, thread, other);
  if (by < 0) spa_fail("race: shared byte %ld, %s by thread %d, %s by warp %d", at, what, thread, other, -1 - by);
  spa_fail("race: shared byte %ld, %s by thread %d, %s by thread %d", at, what, thread, other, by);
}

// Whether no barrier is between now and what `by` did.
static bool spa_unordered(const spa_thread* self, int by, int block, int warp) {
  if (block == SPA_PENDING) return true;
  if (block < self->block_barriers || by == self->number) return false;
  if (by <= SPA_MANY) return true;
  return (by < 0 ? -1 - by : by / SPA_LANES) != self->number / SPA_LANES || warp == self->warp_barriers;
}

static long spa_shared_place(const void* p) {
  long at = (const char*)p - spa_gpu.shared;
  return at >= 0 && at < spa_gpu.shared_bytes ? at : -1;
}

static void spa_reads(const void* p, int size) {
  spa_thread* self = spa_gpu.current;
  long first = spa_shared_place(p);
  if (first < 0) return;
  for (long at = first / 2; at < (first + size + 1) / 2; ++at) {
    spa_mark* m = &spa_gpu.marks[at];
    if (spa_unordered(self, m->writer, m->write_block, m->write_warp))
      spa_race(2 * at, "read", self->number, m->write_block == SPA_PENDING ? "being copied" : "written", m->writer);
    int warp = self->number / SPA_LANES;
    if (m->read_block < self->block_barriers) {
      m->reader = self->number;
    } else if (m->reader != self->number && m->reader != SPA_MANY) {
      int other = m->reader < 0 ? -1 - m->reader : m->reader / SPA_LANES;
      if (other != warp) m->reader = SPA_MANY;
      else m->reader = m->read_warp < self->warp_barriers ? self->number : -1 - warp;
    }
    m->read_block = self->block_barriers, m->read_warp = self->warp_barriers;
  }
}

// `value` is what will be there, null if that is not known. Several threads may write the same: it is there, then.
static void spa_writes(const void* p, int size, const void* value, int pending) {
  spa_thread* self = spa_gpu.current;
  long first = spa_shared_place(p);
  if (first < 0) return;
  for (long at = first / 2; at < (first + size + 1) / 2; ++at) {
    spa_mark* m = &spa_gpu.marks[at];
    if (spa_unordered(self, m->reader, m->read_block, m->read_warp))
      spa_race(2 * at, "written", self->number, "read", m->reader);
    bool same = value && m->write_block != SPA_PENDING && size >= 2 &&
                !memcmp(spa_gpu.shared + 2 * at, (const char*)value + (2 * at - first), 2);
    if (!same && spa_unordered(self, m->writer, m->write_block, m->write_warp))
      spa_race(2 * at, "written", self->number, m->write_block == SPA_PENDING ? "being copied" : "written", m->writer);
    m->writer = self->number, m->write_block = pending ? SPA_PENDING : self->block_barriers,
    m->write_warp = self->warp_barriers;
  }
}

// The buffer of shared memory and its elements, as kernels index them.
template <class T>
struct spa_element {
  T* at;
  operator T() const { return spa_reads(at, sizeof(T)), *at; }
  spa_element& operator=(T value) { return spa_writes(at, sizeof(T), &value, 0), *at = value, *this; }
  spa_element& operator=(const spa_element& other) { return *this = (T)other; }
  T* operator&() const { return at; }
};
template <class T>
struct spa_buffer {
  T* start;
  template <class Index>
  spa_element<T> operator[](Index i) const {
    return {start + i};
  }
  operator T*() const { return start; }
};

// ---- asynchronous copies ----

static void spa_land(spa_copy* copy) {
  memcpy(copy->to, copy->from, copy->valid);
  memset(copy->to + copy->valid, 0, copy->size - copy->valid);
  copy->landed = 1;
}

static void spa_copy_begin(void* shared, const void* global, int size, int valid, const char* what) {
  spa_thread* self = spa_gpu.current;
  if (valid < 0 || valid > size) spa_fail("%s: %d of %d bytes", what, valid, size);
  spa_check_shared(shared, size, size, what);
  spa_check(global, valid, size, what);
  spa_copy copy = {(char*)shared, (const char*)global, size, valid, self->group, 0};
  spa_writes(shared, size, nullptr, 1);
  memset(shared, 0xff, size);
  if (spa_chance(3) == 0) spa_land(&copy);
  if (self->n_copies == SPA_COPIES) spa_fail("%s: more than %d copies in flight", what, (int)SPA_COPIES);
  self->copies[self->n_copies++] = copy;
}

static void spa_copy_commit() { spa_gpu.current->group++; }

static void spa_copy_wait(int in_flight) {
  spa_thread* self = spa_gpu.current;
  int left = 0;
  for (int i = 0; i < self->n_copies; ++i) {
    spa_copy* copy = &self->copies[i];
    if (copy->group < self->group - in_flight) {
      if (!copy->landed) spa_land(copy);
      for (long at = spa_shared_place(copy->to) / 2, end = at + copy->size / 2; at < end; ++at)
        spa_gpu.marks[at].write_block = self->block_barriers, spa_gpu.marks[at].write_warp = self->warp_barriers;
    } else {
      self->copies[left++] = self->copies[i];
    }
  }
  self->n_copies = left;
}

// ---- launches ----

static void spa_fiber() {
  spa_gpu.entry();
  spa_gpu.current->state = SPA_DONE;
  spa_gpu.n_live--;
  spa_yield();
}

static void spa_run_block() {
  memset(spa_gpu.shared, 0xff, spa_gpu.shared_bytes);
  memset(spa_gpu.at_warp, 0, sizeof spa_gpu.at_warp);
  memset(spa_gpu.at_barrier, 0, sizeof spa_gpu.at_barrier);
  spa_gpu.n_ready = 0;
  spa_gpu.n_live = spa_gpu.n_threads;
  ++spa_gpu.barriers;
  for (int i = 0; i < spa_gpu.n_threads; ++i) {
    spa_thread* thread = &spa_gpu.threads[i];
    thread->number = i;
    thread->index = {(unsigned)i, 0, 0};
    thread->n_copies = thread->group = thread->warp_barriers = 0;
    thread->block_barriers = spa_gpu.barriers;
    void** top = (void**)(thread->stack + SPA_STACK) - 1;  // as after a call: 8 off a multiple of 16
    *--top = (void*)spa_fiber;
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    thread->stack_pointer = top;
    spa_wake(thread);
  }
  while (spa_gpu.n_ready) {
    int pick = (int)spa_chance(spa_gpu.n_ready);
    spa_thread* next = &spa_gpu.threads[spa_gpu.ready[pick]];
    spa_gpu.ready[pick] = spa_gpu.ready[--spa_gpu.n_ready];
    spa_gpu.current = next;
    spa_switch(&spa_gpu.scheduler, next->stack_pointer);
    spa_gpu.current = nullptr;
    if (spa_gpu.message[0]) return;
  }
  if (spa_gpu.n_live) {
    int barrier = 0, warp = 0, one = 0;
    for (int i = 0; i < spa_gpu.n_threads; ++i) {
      barrier += spa_gpu.threads[i].state == SPA_AT_BARRIER;
      warp += spa_gpu.threads[i].state == SPA_AT_WARP;
      if (spa_gpu.threads[i].state == SPA_AT_WARP) one = i;
    }
    snprintf(
        spa_gpu.message, sizeof spa_gpu.message,
        "deadlock in block %u %u %u: %d threads are at a barrier, %d at an operation of their warp (thread %d: %s), "
        "%d have ended",
        spa_block.x, spa_block.y, spa_block.z, barrier, warp, one, warp ? spa_gpu.threads[one].operation : "",
        spa_gpu.n_threads - spa_gpu.n_live);
  }
}

// An access of a page that is not there ends the launch, too: the thread goes on in spa_crashed instead.
static void* spa_crash_address;

static void spa_crashed() {
  char* at = (char*)spa_crash_address;
  for (int i = 0; i < spa_gpu.n_buffers; ++i) {
    long past = at - spa_gpu.buffers[i].end;
    if (past >= 0 && past < 4096) spa_fail("an access %ld bytes past the end of buffer %d", past, i);
  }
  spa_fail("an access outside of all memory, %ld of shared memory", (long)(at - spa_gpu.shared));
}

static void spa_on_signal(int number, siginfo_t* info, void* context) {
  if (!spa_gpu.current) {
    signal(number, SIG_DFL);
    return;
  }
  spa_crash_address = info->si_addr;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  registers[REG_RIP] = (greg_t)spa_crashed;
  registers[REG_RSP] = (greg_t)(spa_gpu.current->stack + SPA_STACK / 2 - 8);
}

static char* spa_map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : (char*)memory;
}

// As cuLaunchKernel: `entry` runs once for each thread. Returns a message, empty when all went well.
static const char* spa_launch(void (*entry)(void), const int* grid, int threads, int shared_bytes, uint64_t seed,
                              void* const* buffers, const long* sizes, int n_buffers) {
  spa_gpu.message[0] = 0;
  spa_gpu.current = nullptr;
  if (threads < 1 || threads > SPA_MAX_THREADS || threads % SPA_LANES || n_buffers > SPA_BUFFERS) {
    return "threads are no multiple of 32 up to 1024, or there are too many buffers";
  }
  size_t page = 4096, room = (shared_bytes + page - 1) / page * page,
         own = (sizeof(spa_thread) * threads + page - 1) / page * page,
         marked = (sizeof(spa_mark) * (shared_bytes / 2 + 1) + page - 1) / page * page;
  char *shared = spa_map(room + page), *stacks = spa_map((size_t)threads * SPA_STACK), *state = spa_map(own),
       *marks = spa_map(marked);
  if (!shared || !stacks || !state || !marks || mprotect(shared + room, page, PROT_NONE)) return "out of memory";
  spa_gpu.threads = (spa_thread*)state;
  // The end borders on a page that cannot be touched, up to what alignment takes.
  spa_gpu.shared = shared + room - (shared_bytes + 127) / 128 * 128;
  spa_gpu.shared_bytes = shared_bytes;
  spa_gpu.marks = (spa_mark*)marks;
  spa_gpu.barriers = 0;
  spa_gpu.n_threads = threads;
  spa_gpu.entry = entry;
  spa_gpu.random = seed * 2654435769u + 88172645463325252ull;
  spa_gpu.n_buffers = n_buffers;
  for (int i = 0; i < n_buffers; ++i) {
    spa_gpu.buffers[i].start = (const char*)buffers[i];
    spa_gpu.buffers[i].end = (const char*)buffers[i] + sizes[i];
  }
  for (int i = 0; i < threads; ++i) spa_gpu.threads[i].stack = stacks + (size_t)i * SPA_STACK;
  spa_grid = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  spa_block_size = {(unsigned)threads, 1, 1};
  char* signal_stack = spa_map(64 << 10);
  stack_t alternative = {}, old_stack;
  alternative.ss_sp = signal_stack, alternative.ss_size = 64 << 10;
  struct sigaction crash = {}, old_segv, old_bus;
  crash.sa_sigaction = spa_on_signal;
  crash.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaltstack(&alternative, &old_stack);
  sigaction(SIGSEGV, &crash, &old_segv);
  sigaction(SIGBUS, &crash, &old_bus);
  for (int z = 0; z < grid[2] && !spa_gpu.message[0]; ++z) {
    for (int y = 0; y < grid[1] && !spa_gpu.message[0]; ++y) {
      for (int x = 0; x < grid[0] && !spa_gpu.message[0]; ++x) {
        spa_block = {(unsigned)x, (unsigned)y, (unsigned)z};
        spa_run_block();
      }
    }
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  munmap(signal_stack, 64 << 10);
  munmap(shared, room + page);
  munmap(stacks, (size_t)threads * SPA_STACK);
  munmap(state, own);
  munmap(marks, marked);
  return spa_gpu.message;
}

// A kernel's arguments as cuLaunchKernel takes them: pointers to each.
static void** spa_arguments;
template <class T, T...>
struct spa_indices {};
template <class... Types, int... I>
static void spa_apply(void (*kernel)(Types...), spa_indices<int, I...>) {
  kernel(*(Types*)spa_arguments[I]...);
}
template <class... Types>
static void spa_call(void (*kernel)(Types...)) {
  spa_apply(kernel, __make_integer_seq<spa_indices, int, sizeof...(Types)>());
}

#define SPA_LAUNCHER(name)                                                                                  \
  extern "C" const char* launch_##name(void** arguments, const int* grid, int threads, int shared_bytes,    \
                                       uint64_t seed, void* const* buffers, const long* sizes, int count) { \
    spa_arguments = arguments;                                                                              \
    return spa_launch([] { spa_call(name); }, grid, threads, shared_bytes, seed, buffers, sizes, count);    \
  }
