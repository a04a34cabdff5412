// Runs a CUDA kernel on a CPU, to prove its index arithmetic: blocks one after the other, a block's
// threads as fibers that take turns at barriers. A product across a warp follows the fragment
// layout of m16n8k16 in the PTX ISA. A 16-bit operand holds the upper half of a float32.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Place {
  int x;
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

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
}

// Each block of `threads` threads runs `kernel`, which reads threadIdx and blockIdx.
inline void launch(int grid, int threads, void (*kernel)()) {
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / 32);
    for (Fiber& fiber : fibers) {
      constexpr size_t size = 1 << 16;
      fiber.stack = std::make_unique<char[]>(size);
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

inline float wide(uint32_t half) {
  half <<= 16;
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
