// How a GEMM of few tokens reads: weights once, tokens as they come from the kernel in front.

#ifndef EMULATED  // what the CPU twin in the tests stands in for
// 16 bytes that nobody reads again; anything, unread, unless live. No branch, so that the load may
// move up among the products that still use its registers' neighbours.
__device__ __forceinline__ uint4 stream(const u8* at, bool live) {
  uint4 x;
  asm volatile(
      "{ .reg .pred live; setp.ne.u32 live, %5, 0;"
      "@live ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(at), "r"((u32)live));
  return x;
}

// Not through the read-only path: the kernel in front may write this while the block is there.
__device__ __forceinline__ uint4 load(const u8* at) { return *reinterpret_cast<const uint4*>(at); }
#endif

__device__ __forceinline__ u32 word(const uint4& v, int i) {  // i is known when this is compiled
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

