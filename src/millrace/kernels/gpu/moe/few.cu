// The two GEMMs of the experts of few tokens; it stands behind gemm/few.cu, whose way it is.
//
// A block has one expert and PARTS times 16 rows of its weight, which stream once for 8 tokens of the
// expert. Up to 8 tokens there is a block for each pair of a token and one of its experts; the pair of
// the expert's first token does the work for the others, whose blocks end at once, so nothing is
// sorted before. More tokens are GROUPED: a block has a tile of 8 of them.
//
// The first GEMM (GATED) takes 8 rows of the gate and the same 8 of what it gates, and writes
// silu(gate) * up in bfloat16. The second quantizes none of it: a group of 128 is scaled to the range
// of e4m3, and multiplied in float16, which is finer. A token's result depends on no other token.

// A lane's part of a group: as in `fetch`, with row g + 8 of the block `apart` bytes behind row g.
struct Pair {
  uint4 upper[2], lower[2];
  float upper_scale, lower_scale;
};

__device__ __forceinline__ void fetch(Pair& part, const u8* at, i64 apart, const float* scale,
                                      const float* other, bool live) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    part.upper[half] = stream(at + 64 * half, live);
    part.lower[half] = stream(at + 64 * half + apart, live);
  }
  part.upper_scale = live ? *scale : 0.f;
  part.lower_scale = live ? *other : 0.f;
}

__device__ __forceinline__ float upper_half(u32 word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ float lower_half(u32 word) { return __uint_as_float(word << 16); }

// The operand of one token's group: b[half][product][2], and the scale of the token.
struct Token {
  u32 b[2][4][2];
  float scale;
};

// e4m3 values of a group, at the lane's byte 16 l of it, with their scale.
__device__ __forceinline__ void read(Token& token, const u8* at, const float* scale, bool live) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint4 values = make_uint4(0, 0, 0, 0);
    if (live) values = load(at + 64 * half);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      token.b[half][i][0] = widen((u16)word(values, i));
      token.b[half][i][1] = widen((u16)(word(values, i) >> 16));
    }
  }
  token.scale = live ? *scale : 0.f;
}

// bfloat16 values of a group, at the lane's channel 16 l of it; the four lanes of a token scale them.
__device__ __forceinline__ void read(Token& token, const u16* at, bool live, int lane) {
  uint4 values[2][2];
  float most = 0.f;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      values[half][i] = make_uint4(0, 0, 0, 0);
      if (live) values[half][i] = load(reinterpret_cast<const u8*>(at + 64 * half + 8 * i));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 two = word(values[half][i], j);
        most = fmaxf(most, fmaxf(fabsf(lower_half(two)), fabsf(upper_half(two))));
      }
    }
  }
  most = fmaxf(most, __shfl_sync(0xffffffffu, most, lane ^ 1));
  most = fmaxf(most, __shfl_sync(0xffffffffu, most, lane ^ 2));
  token.scale = fmaxf(most, 1e-10f) / 448.f;
  const float inverse = 1.f / token.scale;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 two = word(values[half][i / 2], i % 2 * 2 + j);
        token.b[half][i][j] = halves(lower_half(two) * inverse, upper_half(two) * inverse);
      }
    }
  }
}

__device__ __forceinline__ void multiply(float* acc, const Pair& w, const Token& token, int l) {
  float sum[4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 upper = word(w.upper[half], i), lower = word(w.lower[half], i);
      const u32 a[4] = {widen((u16)upper), widen((u16)lower), widen((u16)(upper >> 16)),
                        widen((u16)(lower >> 16))};
      mma(sum, a, token.b[half][i]);
    }
  }
#pragma unroll
  for (int side = 0; side < 2; side++) {
    // Lane 4 t has token t; sums are of tokens 2 l and 2 l + 1.
    const float scale = __shfl_sync(0xffffffffu, token.scale, 4 * (2 * l + side));
    acc[side] += sum[side] * (w.upper_scale * scale);
    acc[side + 2] += sum[side + 2] * (w.lower_scale * scale);
  }
}

// x: GATED: e4m3 [T, K] with scales sx, a token's neighbours, groups sx_stride apart; else bfloat16
// [T * TOP_K, K]. w: e4m3 [E, ROWS, K] with scales [E, ROWS / 128, K / 128], where GATED has 2 * OUT
// rows and the other OUT. experts: [T, TOP_K], -1 for those that are elsewhere; GROUPED: of each row
// in tiles of TOKENS, -1 for rows that are not there, and pairs: of each row. out: bfloat16
// [T * TOP_K, OUT]. K is a multiple of 128, and OUT of it and of PARTS * STEP. Without GROUPED, T is
// at most TOKENS. Block (i, p) has PARTS parts of the outputs, from i * PARTS on, for the expert of
// pair p, or of tile p.
// The second GEMM needs more registers than 32 warps of a multiprocessor leave a thread.
extern "C" __global__ void __launch_bounds__(32 * WARPS, (GATED ? 32 : 20) / WARPS)
    experts_few(const u8* x, const float* sx, const u8* w, const float* sw, const int* experts,
                const int* pairs, u16* out, int T, int TOP_K, int OUT, int K, int sx_stride) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
  const int place = GROUPED ? blockIdx.y * TOKENS : blockIdx.y;
  const int expert = experts[place], groups = K / GROUP;
  if (expert < 0) return;  // it is on another rank, or there is none
  constexpr int STEP = GATED ? ROWS / 2 : ROWS;
  const int rows = GATED ? 2 * OUT : OUT, first = blockIdx.x * PARTS * STEP;
  const i64 base = (i64)expert * rows;
  const i64 apart = (GATED ? (i64)OUT : 8) * K;
  const u8* at = w + (base + first + g) * K + 16 * l;
  const float* scales = sw + base / 128 * groups;
  const i64 other = GATED ? (i64)(OUT / 128) * groups : 0;

  // The weights of step i, of this warp: of part i / turns, its group warp + WARPS * (i % turns).
  const int turns = (groups + WARPS - 1) / WARPS;
  const auto weights = [&](Pair& held, int step) {
    const int part = step / turns, group = warp + WARPS * (step - part * turns);
    const float* scale = scales + (i64)((first + part * STEP) / 128) * groups + group;
    fetch(held, at + (i64)part * STEP * K + group * GROUP, apart, scale, scale + other,
          part < PARTS && group < groups);
  };
  Pair held;
  weights(held, 0);

  int mine = -1;  // the pair of the g-th token of the expert; -1: there are fewer
  if (GROUPED) {
    if (experts[place + g] >= 0) mine = pairs[place + g];
  } else {
    int choice = -1;  // of token `lane`
    if (lane < T) {
      for (int k = 0; k < TOP_K; k++) choice = experts[lane * TOP_K + k] == expert ? k : choice;
    }
    u32 left = __ballot_sync(0xffffffffu, choice >= 0);
    if (__ffs(left) - 1 != place / TOP_K) return;
    for (int i = 0; i < g; i++) left &= left - 1;
    const int token = __ffs(left) - 1;
    const int chosen = __shfl_sync(0xffffffffu, choice, token >= 0 ? token : 0);
    if (token >= 0) mine = token * TOP_K + chosen;
  }
  const bool live = mine >= 0;
  const int row = live ? (GATED ? mine / TOP_K : mine) : 0;

  __shared__ float sums[PARTS][WARPS][ROWS][TOKENS];
  __shared__ int places[TOKENS];
  if (warp == 0 && l == 0) places[g] = mine;
  Token operand;
  for (int part = 0; part < PARTS; part++) {
    float acc[4] = {};
    for (int turn = 0; turn < turns; turn++) {
      const int group = warp + WARPS * turn;
      if (part == 0 || turns > 1) {  // else it is the one of the part before
        const bool there = live && group < groups;
        if (GATED) {
          read(operand, x + (i64)row * K + group * GROUP + 16 * l,
               sx + (i64)group * sx_stride + row, there);
        } else {
          const u16* wide = reinterpret_cast<const u16*>(x);
          read(operand, wide + (i64)row * K + group * GROUP + 16 * l, there, lane);
        }
      }
      multiply(acc, held, operand, l);
      weights(held, part * turns + turn + 1);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) sums[part][warp][g + 8 * (e / 2)][2 * l + e % 2] = acc[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < PARTS * TOKENS * STEP / 2; i += 32 * WARPS) {
    const int part = i / (TOKENS * STEP / 2), column = i / (STEP / 2) % TOKENS;
    const int output = i % (STEP / 2) * 2, to = places[column];
    if (to < 0) continue;
    float a = 0.f, b = 0.f, c = 0.f, d = 0.f;
#pragma unroll
    for (int one = 0; one < WARPS; one++) {
      float(*found)[TOKENS] = sums[part][one];
      a += found[output][column], b += found[output + 1][column];
      if (GATED) c += found[output + 8][column], d += found[output + 9][column];
    }
    if (GATED) a = a / (1.f + __expf(-a)) * c, b = b / (1.f + __expf(-b)) * d;
    *reinterpret_cast<u32*>(out + (i64)to * OUT + first + part * STEP + output) = pack(a, b);
  }
}
