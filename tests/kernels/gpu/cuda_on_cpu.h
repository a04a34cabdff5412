// Runs a CUDA kernel on a CPU, to prove its index arithmetic: blocks one after the other, a block's
// threads as fibers that take turns at barriers. Products across a warp follow the fragment layouts
// of m16n8k16 and of m16n8k8 (tf32) in the PTX ISA. A 16-bit operand holds the upper half of a
// float32.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline void let_next_start() {}
inline void await_previous() {}
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Place {
  int x, y;
};
static Place threadIdx, blockIdx;

struct Barrier {
  int waiting = 0, passed = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

struct Warp {
  Barrier barrier;
  uint32_t a[32][4], b[32][2];
  float value[32];
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block_barrier;
static void (*body)();

inline void wait(Barrier& barrier, int of) {
  const int mine = threadIdx.x, before = barrier.passed;
  if (++barrier.waiting == of) {
    barrier.waiting = 0, barrier.passed++;
    return;
  }
  while (barrier.passed == before) swapcontext(&fibers[mine].context, &scheduler);
}

inline void __syncthreads() { wait(block_barrier, fibers.size()); }
inline void __syncwarp() { wait(warps[threadIdx.x / 32].barrier, 32); }

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
}

// Each block of `threads` threads runs `kernel`, which reads threadIdx and blockIdx. Shared memory
// keeps what the block before left there.
inline void launch(int columns, int threads, void (*kernel)(), int rows = 1) {
  body = kernel;
  for (int block = 0; block < columns * rows; block++) {
    blockIdx.x = block % columns, blockIdx.y = block / columns;
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / 32);
    for (Fiber& fiber : fibers) {
      constexpr size_t size = 1 << 16;
      fiber.stack.reset(new char[size]);  // not zeroed
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = size;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (int left = threads; left;) {
      left = 0;
      for (int i = 0; i < threads; i++) {
        if (fibers[i].done) continue;
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
        left += !fibers[i].done;
      }
    }
  }
}

inline float wide(uint32_t half, uint32_t lower = 0) {
  half = half << 16 | lower;
  float x;
  memcpy(&x, &half, 4);
  return x;
}

inline uint32_t bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}

inline float from_e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 127) == 127) return wide(0x7fc0);
  const float size = exponent ? wide((exponent + 120) << 7 | mantissa << 4) : mantissa / 512.f;
  return x & 128 ? -size : size;
}

inline uint32_t widen(uint16_t pair) {
  return bits(from_e4m3(pair & 255)) >> 16 | (bits(from_e4m3(pair >> 8)) & 0xffff0000u);
}

inline uint4 load(const uint8_t* at) {
  uint4 x;
  memcpy(&x, at, 16);
  return x;
}
inline uint4 stream(const uint8_t* at, bool live) { return live ? load(at) : uint4{}; }

inline uint32_t rounded(float x) {  // bfloat16, to nearest even
  const uint32_t b = bits(x);
  return x != x ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline uint32_t pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline uint32_t halves(float low, float high) { return pack(low, high); }

inline float from_half(uint16_t x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return y;
}
inline uint16_t half_of(float x) {
  const _Float16 y = min(max(x, -65504.f), 65504.f);
  uint16_t raw;
  memcpy(&raw, &y, 2);
  return raw;
}
inline uint32_t pack_half(float low, float high) { return half_of(low) | half_of(high) << 16; }

inline void mma(float* d, const uint32_t* a, const uint32_t* b) {
  const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
  Warp& warp = warps[threadIdx.x / 32];
  memcpy(warp.a[lane], a, 16);
  memcpy(warp.b[lane], b, 8);
  wait(warp.barrier, 32);
  for (int e = 0; e < 4; e++) {
    const int upper = e < 2, column = 2 * l + e % 2;
    for (int k = 0; k < 16; k++) {
      const int holder = k % 8 / 2, shift = 16 * (k % 2);
      const uint32_t left = warp.a[4 * g + holder][(upper ? 0 : 1) + (k < 8 ? 0 : 2)];
      const uint32_t right = warp.b[4 * column + holder][k < 8 ? 0 : 1];
      d[e] += wide(left >> shift & 0xffff) * wide(right >> shift & 0xffff);
    }
  }
  wait(warp.barrier, 32);
}

inline void mma(float* d, const float* a, float b0, float b1) {
  const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
  Warp& warp = warps[threadIdx.x / 32];
  const auto tf32 = [](float x) { return bits(x) & 0xffffe000u; };
  for (int i = 0; i < 4; i++) warp.a[lane][i] = tf32(a[i]);
  warp.b[lane][0] = tf32(b0), warp.b[lane][1] = tf32(b1);
  wait(warp.barrier, 32);
  for (int e = 0; e < 4; e++) {
    for (int k = 0; k < 8; k++) {
      const uint32_t left = warp.a[4 * g + k % 4][e / 2 + k / 4 * 2];
      const uint32_t right = warp.b[4 * (2 * l + e % 2) + k % 4][k / 4];
      d[e] += wide(left >> 16, left & 0xffff) * wide(right >> 16, right & 0xffff);
    }
  }
  wait(warp.barrier, 32);
}

// What lane `from` of the warp has as `mine`; all lanes call it together.
inline float exchange(float mine, int from) {
  Warp& warp = warps[threadIdx.x / 32];
  warp.value[threadIdx.x % 32] = mine;
  wait(warp.barrier, 32);
  const float theirs = warp.value[from];
  wait(warp.barrier, 32);
  return theirs;
}

inline float __shfl_sync(uint32_t, float x, int from) { return exchange(x, from); }
inline int __shfl_sync(uint32_t, int x, int from) { return int(exchange(x, from)); }  // exact: small
inline uint32_t __ballot_sync(uint32_t, bool mine) {
  uint32_t found = 0;
  for (int lane = 0; lane < 32; lane++) found |= uint32_t(exchange(mine, lane)) << lane;
  return found;
}
inline int shifted_up(int x, int by) { return int(exchange(x, std::max(int(threadIdx.x % 32) - by, 0))); }
inline int atomicAdd(int* at, int x) { return (*at += x) - x; }  // threads take turns
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline float __shfl_up_sync(uint32_t, float x, int by, int width) {
  const int lane = threadIdx.x % 32;
  return exchange(x, lane % width < by ? lane : lane - by);
}

inline float __uint_as_float(uint32_t x) { return wide(x >> 16, x & 0xffff); }
inline uint32_t __float_as_uint(float x) { return bits(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float silu(float x) { return x / (1 + expf(-x)); }
inline void copy_async(void* to, const void* from) { memcpy(to, from, 16); }
inline void wait_copies() {}

// Call `kernel` for each thread of these blocks; arguments: the address of each of its arguments.
template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, int columns, int rows, int threads,
          std::index_sequence<I...>) {
  static void (*chosen)(P...);
  static void** given;
  chosen = kernel, given = arguments;
  launch(columns, threads, [] { chosen(*static_cast<P*>(given[I])...); }, rows);
}
template <typename... P>
void call(void (*kernel)(P...), void** arguments, int columns, int rows, int threads) {
  call(kernel, arguments, columns, rows, threads, std::index_sequence_for<P...>{});
}
