// Products of up to 8 tokens with an FP8 weight [OUT, K] that streams once from memory to registers.
//
// WARPS of a block share its 16 rows and take every WARPS-th group of 128 channels; their sums are
// added in the order of the warps. So a token's result depends on WARPS and on nothing else: not on
// how many tokens there are, nor on what the others hold. A warp asks for its next group as it works
// on the last; the 32 warps of a multiprocessor then have enough in flight. Two groups a warp need
// registers of which more warps make better use: that measured slower, and so did two tiles of rows.
//
// Products are m16n8k16 in float16, which holds every e4m3 value, with the weight as the operand of
// 16 rows; sums are float32. (Hopper's own e4m3 form of mma.sync is the same two steps, made by the
// assembler.) Which channel an inner index stands for is ours to choose: lane = 4 g + l holds rows g
// and g + 8 and token g, bytes 16 l .. 16 l + 15 of either half of a group, of which word i goes into
// product i of 4.

constexpr int GROUP = 128, ROWS = 16, TOKENS = 8;  // WARPS is given

#ifndef EMULATED  // what the CPU twin in the tests stands in for
// Two e4m3 to two float16.
__device__ __forceinline__ u32 widen(u16 pair) {
  u32 d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(pair));
  return d;
}

__device__ __forceinline__ void mma(float* d, const u32* a, const u32* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ u32 halves(float low, float high) {  // two float16, rounded to nearest
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
#endif

// A lane's part of one group: rows g and g + 8, either half, and the scale of the whole block.
struct Weights {
  uint4 upper[2], lower[2];
  float scale;
};

// at: row g, at the group's byte 16 l.
__device__ __forceinline__ void fetch(Weights& part, const u8* at, const float* scale, int K,
                                      bool live) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    part.upper[half] = stream(at + 64 * half, live);
    part.lower[half] = stream(at + 64 * half + (i64)8 * K, live);
  }
  part.scale = live ? *scale : 0.f;
}

// acc += the products of one group, scaled. acc: rows g, g, g + 8, g + 8 for tokens 2 l, 2 l + 1,
// 2 l, 2 l + 1. x, scales: the group's, of T tokens; others are zero.
__device__ __forceinline__ void multiply(float* acc, const Weights& w, const u8* x,
                                         const float* scales, int T, int K, int g, int l) {
  float sum[4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint4 values = make_uint4(0, 0, 0, 0);
    if (g < T) values = load(x + (i64)g * K + 64 * half + 16 * l);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 token = word(values, i), upper = word(w.upper[half], i),
                lower = word(w.lower[half], i);
      const u32 a[4] = {widen((u16)upper), widen((u16)lower), widen((u16)(upper >> 16)),
                        widen((u16)(lower >> 16))};
      const u32 b[2] = {widen((u16)token), widen((u16)(token >> 16))};
      mma(sum, a, b);
    }
  }
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const int token = 2 * l + side;
    const float scale = token < T ? w.scale * scales[token] : 0.f;
    acc[side] += sum[side] * scale;
    acc[side + 2] += sum[side + 2] * scale;
  }
}

// x: e4m3 [T, K], T <= TOKENS; sx: its scales, a token's neighbours, groups sx_stride apart.
// w: e4m3 [OUT, K], 16 bytes aligned; sw: [OUT / 128, K / 128], rows sw_stride apart.
// out: bfloat16 [T, OUT]. K and OUT are multiples of 128; blockIdx.x takes ROWS of OUT.
// Four blocks must find room on a multiprocessor, which leaves a thread 64 registers.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
    gemm_few(const u8* x, const float* sx, const u8* w, const float* sw, u16* out, int T, int OUT,
             int K, int sx_stride, int sw_stride) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
  const int first_row = blockIdx.x * ROWS, groups = K / GROUP;
  const u8* rows = w + (i64)(first_row + g) * K + 16 * l;
  const float* row_scales = sw + (i64)(first_row / 128) * sw_stride;

  let_next_start();
  Weights held;
  fetch(held, rows + warp * GROUP, row_scales + warp, K, warp < groups);
  await_previous();  // the weight is there, x need not be yet
  float acc[4] = {};
  for (int next = warp + WARPS; next - WARPS < groups; next += WARPS) {
    const int group = next - WARPS;
    multiply(acc, held, x + group * GROUP, sx + (i64)group * sx_stride, T, K, g, l);
    fetch(held, rows + next * GROUP, row_scales + next, K, next < groups);
  }

  __shared__ float sums[WARPS][ROWS][TOKENS];
#pragma unroll
  for (int e = 0; e < 4; e++) sums[warp][g + 8 * (e / 2)][2 * l + e % 2] = acc[e];
  __syncthreads();
  for (int i = threadIdx.x; i < T * ROWS / 2; i += 32 * WARPS) {
    const int token = i / (ROWS / 2), row = i % (ROWS / 2) * 2;
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int other = 0; other < WARPS; other++) {
      a += sums[other][row][token], b += sums[other][row + 1][token];
    }
    *reinterpret_cast<u32*>(out + (i64)token * OUT + first_row + row) = pack(a, b);
  }
}
