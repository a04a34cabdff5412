// Products of up to 8 tokens with a weight of 4 bits [OUT, K] that streams once from memory to
// registers, where it is widened to bfloat16.
//
// As few.cu: WARPS of a block share its 16 * TILES rows, and take every WARPS-th run of DEPTH groups
// of 128 channels; their sums are added in the order of the warps. So a token's result depends on these
// constants alone, and not on the tokens beside it. A warp asks for the codes, scales and tokens of
// its next run before it works on the last. Two tiles read each token's channels half as often as one.
// BLOCKS of them must find room on a multiprocessor.
//
// Codes become numbers without a conversion: 0x4300 | code is 128 + code in bfloat16. Two codes that
// are 16 bits apart take a shift and a logical instruction, and are an operand of m16n8k16 as they
// are. What is too much is known from the sum of the tokens' channels, which one more product with ones
// brings: a group adds scale * (sum - (128 + zero) * sum of x), in float32. Which channel an inner
// index stands for is ours to choose: lane = 4 g + l has rows g and g + 8 of a tile and token g,
// channels 32 l .. 32 l + 31 of a group; of 8 channels that a word has, product p of 2 takes the pairs
// (2 p, 2 p + 4) and (2 p + 1, 2 p + 5).

constexpr int GROUP = 128, ROWS = 16 * TILES, TOKENS = 8;  // capitals are given

#ifndef EMULATED  // what the CPU twin in the tests stands in for
__device__ __forceinline__ void mma(float* d, const u32* a, const u32* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }
#endif

// 128 + code of channels i and i + 4 of a word.
__device__ __forceinline__ u32 pair_of(u32 codes, int i) {
  return (codes >> 4 * i & 0x000f000fu) | 0x43004300u;
}

// A lane's part of a run: rows g and g + 8 of each tile; of token g the channels that they meet.
struct Run {
  uint4 codes[DEPTH][TILES][2];
  u16 scale[DEPTH][TILES][2];
  u8 zero[DEPTH][TILES][2];
  uint4 x[DEPTH][4];
};

// Where a lane reads: codes at row g and its channels of group 0, scales and zeros of row g, token g.
struct Source {
  const u8* codes;
  const u16* scales;
  const u8* zeros;
  const u16* x;
  int K, groups, each;  // groups: scales of a row; each: groups of 128 that share one
  bool live;            // there is a token g
};

__device__ __forceinline__ void fetch_weights(Run& part, const Source& from, int run) {
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    const int group = run * DEPTH + d;
    const bool live = group < from.K / GROUP;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        const int row = 16 * t + 8 * side;
        part.codes[d][t][side] =
            stream(from.codes + row * (from.K / 2) + group * (GROUP / 2), live);
        const int at = row * from.groups + group / from.each;
        part.scale[d][t][side] = live ? from.scales[at] : 0;
        if (ZEROS) part.zero[d][t][side] = live ? from.zeros[at] : 0;
      }
  }
}

__device__ __forceinline__ void fetch_tokens(Run& part, const Source& from, int run) {
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    const int group = run * DEPTH + d;
    const bool live = from.live && group < from.K / GROUP;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      part.x[d][c] = make_uint4(0, 0, 0, 0);
      if (live)
        part.x[d][c] = load(reinterpret_cast<const u8*>(from.x + group * GROUP + 8 * c));
    }
  }
}

// acc += the products of a run. acc of a tile: rows g, g, g + 8, g + 8 for tokens 2 l, 2 l + 1, 2 l,
// 2 l + 1. Where there is no group, tokens and scales are zeros.
__device__ __forceinline__ void multiply(float (*acc)[4], const Run& run) {
  const u32 ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    float sum[TILES][4] = {}, of_x[4] = {};
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const uint4& v = run.x[d][c];
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const u32 front = p ? v.y : v.x, back = p ? v.w : v.z;
        const u32 b[2] = {low_halves(front, back), high_halves(front, back)};
        mma(of_x, ones, b);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const u32 upper = word(run.codes[d][t][0], c), lower = word(run.codes[d][t][1], c);
          const u32 a[4] = {pair_of(upper, 2 * p), pair_of(lower, 2 * p),
                            pair_of(upper, 2 * p + 1), pair_of(lower, 2 * p + 1)};
          mma(sum[t], a, b);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float none = ZEROS ? 128.f + run.zero[d][t][e / 2] : 136.f;
        acc[t][e] += (sum[t][e] - none * of_x[e]) * from_half(run.scale[d][t][e / 2]);
      }
  }
}

// x: bfloat16 [T, K], T <= TOKENS, 16 bytes aligned. codes: [OUT, K / 2] bytes, 16 bytes aligned.
// scales: float16 [OUT, groups]; zeros: bytes, alike; factor: float32 [OUT]. out: bfloat16 [T, OUT].
// K is a multiple of 128 and of groups, OUT of ROWS; blockIdx.x takes ROWS of OUT.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    w4_few(const u16* x, const u8* codes, const u16* scales, const u8* zeros, const float* factor,
           u16* out, int T, int OUT, int K, int groups) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
  const int first_row = blockIdx.x * ROWS, all = K / GROUP, runs = (all + DEPTH - 1) / DEPTH;
  const i64 row = first_row + g;
  const Source from = {codes + row * (K / 2) + 16 * l, scales + row * groups,
                       zeros + row * groups, x + (i64)g * K + 32 * l, K, groups, all / groups,
                       g < T};

  let_next_start();
  Run one, other;
  fetch_weights(one, from, warp);
  await_previous();  // the weight is there, x need not be yet
  fetch_tokens(one, from, warp);
  float acc[TILES][4] = {};
  for (int run = warp; run < runs; run += 2 * WARPS) {
    fetch_weights(other, from, run + WARPS);
    fetch_tokens(other, from, run + WARPS);
    multiply(acc, one);
    fetch_weights(one, from, run + 2 * WARPS);
    fetch_tokens(one, from, run + 2 * WARPS);
    multiply(acc, other);
  }

  __shared__ float sums[WARPS][ROWS][TOKENS];
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      sums[warp][16 * t + g + 8 * (e / 2)][2 * l + e % 2] = acc[t][e];
  __syncthreads();
  for (int i = threadIdx.x; i < T * ROWS / 2; i += 32 * WARPS) {
    const int token = i / (ROWS / 2), at = i % (ROWS / 2) * 2;
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int from_warp = 0; from_warp < WARPS; from_warp++) {
      a += sums[from_warp][at][token], b += sums[from_warp][at + 1][token];
    }
    a *= factor[first_row + at], b *= factor[first_row + at + 1];
    *reinterpret_cast<u32*>(out + (i64)token * OUT + first_row + at) = pack(a, b);
  }
}
