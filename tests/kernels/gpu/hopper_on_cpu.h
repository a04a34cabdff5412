// TMA, mbarriers and wgmma of a Hopper kernel on a CPU, after the layouts that the PTX ISA documents:
// swizzles of 128 bytes, descriptors, fragments. Included after cuda_on_cpu.h; BN is given.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <map>
#define NOTHING (-INFINITY)
#define CONSTANT const

typedef unsigned long long Word;
struct TensorMap {
  const uint16_t* base;
  int rows, width;
};
struct Transfers {
  int count, left, bytes;
  uint32_t phase;
};
static std::map<const void*, Transfers> transfers;
alignas(1024) static uint8_t unaligned[232448];

inline uint32_t shared(const void* at) { return uint32_t((const uint8_t*)at - unaligned); }
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }
inline void settle(Transfers& t) {
  if (!t.left && !t.bytes) t.left = t.count, t.phase ^= 1;
}
inline void open_barrier(Word* b, int count) { transfers[b] = {count, count, 0, 0}; }
inline void arrive(Word* b) { transfers[b].left--, settle(transfers[b]); }
inline void announce(Word* b, uint32_t bytes) { transfers[b].bytes += bytes, arrive(b); }
inline void await(Word* b, uint32_t parity) {
  const int mine = threadIdx.x;
  for (int tries = 0; transfers[b].phase == parity; tries++) {
    if (tries > 100000) fprintf(stderr, "a barrier is never over\n"), abort();
    swapcontext(&fibers[mine].context, &scheduler);
  }
}
inline void fetch(uint8_t* to, const TensorMap& map, int channel, int row, Word* b) {
  for (int r = 0; r < BN; r++) {
    for (int c = 0; c < 64; c++) {
      const bool inside = row + r < map.rows && channel + c < map.width;
      const uint16_t x = inside ? map.base[(int64_t)(row + r) * map.width + channel + c] : 0;
      memcpy(unaligned + swizzled(shared(to) + r * 128 + c * 2), &x, 2);
    }
  }
  transfers[b].bytes -= BN * 128, settle(transfers[b]);
}

inline void show_barriers() {}
inline void begin_products() {}
inline void commit() {}
inline void show_to_products() {}
inline void leave_registers() {}
inline void take_registers() {}
template <int N> void pin(float*) {}
template <int N> void pin_shares(uint32_t*) {}
template <int N> void await_products() {}
static Barrier named[16];
template <int N, int THREADS> void meet() { wait(named[N], THREADS); }
inline float power(float x) { return exp2f(x); }
inline float __shfl_xor_sync(uint32_t, float x, int by) {
  return exchange(x, (threadIdx.x % 32) ^ by);
}

inline float half_at(uint32_t at) {
  uint16_t x;
  memcpy(&x, unaligned + swizzled(at), 2);
  return from_half(x);
}
inline uint32_t first_of(Word d) { return (d & 0x3fff) << 4; }
inline uint32_t leading(Word d) { return (d >> 16 & 0x3fff) << 4; }
inline uint32_t stride(Word d) { return (d >> 32 & 0x3fff) << 4; }
inline float along(Word d, int row, int k) {  // an operand whose rows hold k
  return half_at(first_of(d) + row / 8 * stride(d) + row % 8 * 128 + k * 2);
}
inline float across(Word d, int n, int k) {  // one whose rows hold n
  return half_at(first_of(d) + n / 64 * leading(d) + k / 8 * stride(d) + k % 8 * 128 + n % 64 * 2);
}

struct Group {  // four warps that multiply together
  Barrier barrier;
  float* sums[128];
  const uint32_t* left[128];
};
static Group groups[3];

template <int N, typename A, typename B>
void multiply(Group& group, bool add, A a, B b) {
  static float right[16][N];
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++) right[k][n] = b(n, k);
  for (int row = 0; row < 64; row++) {
    float left[16];
    for (int k = 0; k < 16; k++) left[k] = a(row, k);
    for (int n = 0; n < N; n++) {
      const int thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
      float& sum = group.sums[thread][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
      float total = add ? sum : 0;
      for (int k = 0; k < 16; k++) total += left[k] * right[k][n];
      sum = total;
    }
  }
}
template <typename F> void together(float* sums, const uint32_t* left, F product) {
  Group& group = groups[threadIdx.x / 128];
  const int thread = threadIdx.x % 128;
  group.sums[thread] = sums, group.left[thread] = left;
  wait(group.barrier, 128);
  if (thread == 0) product(group);
  wait(group.barrier, 128);
}
inline void scores(float* S, Word a, Word b, int add) {
  together(S, nullptr, [=](Group& group) {
    multiply<BN>(group, add, [=](int row, int k) { return along(a, row, k); },
                 [=](int n, int k) { return along(b, n, k); });
  });
}
inline void shares(float* O, const uint32_t* P, Word v) {
  together(O, P, [=](Group& group) {
    multiply<256>(group, true, [&](int row, int k) {
      const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
      return from_half(group.left[thread][k / 8 * 2 + row % 16 / 8] >> 16 * (k % 2));
    }, [=](int n, int k) { return across(v, n, k); });
  });
}
