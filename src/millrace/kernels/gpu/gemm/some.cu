// Products of some tokens (9 to TOKENS) with an FP8 weight [OUT, K], for Hopper.
//
// A tile is ROWS rows of the weight and all of the tokens: the weight is the operand of many rows.
// All tiles' groups of 128 channels, one behind the other, are dealt out evenly, so that every block
// streams as much of the weight, whatever its shape. A tile that several blocks share is finished by
// the one that has its first groups, last of what it does; the others leave their sums for it, first
// of what they do, and it adds them in their order. So a token's result depends on the number of
// blocks and on nothing else: not on how many tokens there are, nor on what the others hold.
//
// One warp fetches tiles of the operands, swizzled, and scales into a ring of STAGES; two groups of
// four warps multiply. TOKENS, STAGES and wgmma, the product of 64 rows and 32 channels, are given.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int GROUP = 128, ROWS = 128, PARTS = TOKENS / 2;  // sums of a thread
constexpr int MULTIPLIERS = 256, WARPS = MULTIPLIERS / 32;
constexpr int WEIGHT_BYTES = ROWS * GROUP, X_BYTES = TOKENS * GROUP;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int SCALES = TOKENS + 4;      // of a stage: the tokens', then the weight's
constexpr int OUT_ROW = ROWS + 8;       // in shared memory: tokens fall on banks of their own

#ifndef EMULATED  // what the CPU twin in the tests stands in for
struct __align__(64) TensorMap {
  u64 opaque[16];
};
#define CONSTANT const __grid_constant__

__device__ __forceinline__ u32 shared(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}

// A barrier for `count` arrivals, and for bytes that are announced.
__device__ __forceinline__ void open_barrier(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count));
}

__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}

__device__ __forceinline__ void announce(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void await(u64* barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared(barrier)),
      "r"(parity)
      : "memory");
}

// A box of the operand into shared memory; rows past its end are zeros. Each call of an inlined
// label needs braces of its own, as above.
__device__ __forceinline__ void fetch(u8* to, const TensorMap& map, int channel, int row,
                                      u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared(to)),
      "l"(&map), "r"(channel), "r"(row), "r"(shared(barrier))
      : "memory");
}

__device__ __forceinline__ void fetch_scale(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared(to)), "l"(from) : "memory");
}

// One arrival once all that this thread fetched by fetch_scale is there.
__device__ __forceinline__ void arrive_with_scales(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared(barrier)) : "memory");
}

__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;");
}
__device__ __forceinline__ void await_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// How a tile of 128 bytes a row lies in shared memory: 8 rows to 1,024 bytes, swizzled.
__device__ __forceinline__ u64 described(const u8* at) {
  return (u64)(shared(at) >> 4 & 0x3fff) | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// sums = 64 rows of the weight times the tokens, over a group. Over when this returns.
__device__ __forceinline__ void start_products(float* sums, const u8* weight, const u8* x) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) asm volatile("" : "+f"(sums[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 4; k++) {
    wgmma(sums, described(weight) + 2 * k, described(x) + 2 * k, k > 0);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void await_products(float* sums) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) asm volatile("" : "+f"(sums[i])::"memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < PARTS; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ void meet_multipliers() {
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

__device__ __forceinline__ void set_flag(u32* flag, u32 value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void await_flag(const u32* flag) {
  u32 value;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (!value);
}

__device__ __forceinline__ u16 rounded(float x) {  // to bfloat16, nearest even
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#endif

// Where a block's share of `units` begins.
__device__ __forceinline__ int begins(int block, int blocks, int units) {
  return (int)((i64)units * block / blocks);
}

struct Ring {  // a place in the stages, and how often it came round
  int stage = 0;
  u32 turn = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, turn ^= 1;
  }
};

// The sums' scaled products of groups [from, to) of a tile. ring: goes on.
__device__ __forceinline__ void multiply(float* total, Ring& ring, int groups, const u8* stages,
                                         const float* scales, u64* full, u64* empty) {
  const int thread = threadIdx.x, lane = thread % 32, l = lane % 4, half = thread / 128;
#pragma unroll
  for (int i = 0; i < PARTS; i++) total[i] = 0.f;
  for (int group = 0; group < groups; group++, ring.next()) {
    const u8* weight = stages + ring.stage * STAGE_BYTES;
    const float* scale = scales + ring.stage * SCALES;
    float sums[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) sums[i] = 0.f;
    await(full + ring.stage, ring.turn);
    start_products(sums, weight + half * 64 * GROUP, weight + WEIGHT_BYTES);
    const float own = scale[TOKENS];
    float by[PARTS / 2];  // tokens 8 j + 2 l and the next
#pragma unroll
    for (int i = 0; i < PARTS / 2; i++) by[i] = scale[i / 2 * 8 + 2 * l + i % 2] * own;
    await_products(sums);
    if (lane == 0) arrive(empty + ring.stage);
#pragma unroll
    for (int i = 0; i < PARTS; i++) total[i] += sums[i] * by[i / 4 * 2 + i % 2];
  }
}

// out: [T, OUT] from row `first` on. held: shared memory for the tile.
__device__ __forceinline__ void put(u16* out, u16* held, const float* total, int T, int OUT,
                                    int first) {
  const int thread = threadIdx.x, g = thread % 32 / 4, l = thread % 4, warp = thread / 32;
  meet_multipliers();  // what the tile before left there is out
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int token = i / 4 * 8 + 2 * l + i % 2, row = 16 * warp + g + (i % 4 / 2) * 8;
    held[token * OUT_ROW + row] = rounded(total[i]);
  }
  meet_multipliers();
  for (int i = thread; i < T * (ROWS / 8); i += MULTIPLIERS) {
    const int token = i / (ROWS / 8), row = i % (ROWS / 8) * 8;
    *reinterpret_cast<uint4*>(out + (i64)token * OUT + first + row) =
        *reinterpret_cast<const uint4*>(held + token * OUT_ROW + row);
  }
}

// Shared memory: the stages, the tile on its way out, the stages' scales and barriers.
constexpr int HELD = STAGES * STAGE_BYTES, SCALE = HELD + TOKENS * OUT_ROW * 2;
constexpr int BARRIER = (SCALE + STAGES * SCALES * 4 + 7) / 8 * 8;

// weights: e4m3 [OUT, K] in boxes of ROWS; tokens: e4m3 [T, K] in boxes of TOKENS, both 128 channels
// wide. sx: scales of tokens, a token's neighbours, groups sx_stride apart; sw: [OUT / 128, K / 128],
// rows sw_stride apart. out: bfloat16 [T, OUT]. left: float32, PARTS * MULTIPLIERS for a block;
// flags: one for a block, 0 before and after.
extern "C" __global__ void __launch_bounds__(MULTIPLIERS + 32, 1)
    gemm_some(CONSTANT TensorMap weights, CONSTANT TensorMap tokens, const float* sx,
              const float* sw, u16* out, float* left, u32* flags, int T, int OUT, int K,
              int sx_stride, int sw_stride) {
#ifndef EMULATED
  extern __shared__ __align__(1024) u8 memory[];
#endif
  const int thread = threadIdx.x, lane = thread % 32, block = blockIdx.x, blocks = gridDim.x;
  const int groups = K / GROUP, units = OUT / ROWS * groups;
  const int begin = begins(block, blocks, units), end = begins(block + 1, blocks, units);
  float* scales = reinterpret_cast<float*>(memory + SCALE);
  u64* full = reinterpret_cast<u64*>(memory + BARRIER);
  u64* empty = full + STAGES;
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) open_barrier(full + i, 1 + 32), open_barrier(empty + i, WARPS);
    show_barriers();
  }
  let_next_start();
  __syncthreads();

  if (thread >= MULTIPLIERS) {  // the warp that fetches
    const int ahead = min(end - begin, STAGES);
    for (int i = 0; i < ahead && lane == 0; i++) {  // weights are there whatever runs before
      const int unit = begin + i;
      announce(full + i, STAGE_BYTES);
      fetch(memory + i * STAGE_BYTES, weights, unit % groups * GROUP, unit / groups * ROWS,
            full + i);
    }
    await_previous();
    Ring ring;
    for (int unit = begin; unit < end; unit++, ring.next()) {
      const int group = unit % groups, tile = unit / groups;
      u8* stage = memory + ring.stage * STAGE_BYTES;
      u64* barrier = full + ring.stage;
      if (unit - begin >= STAGES) await(empty + ring.stage, ring.turn ^ 1);
      if (lane == 0) {
        if (unit - begin >= STAGES) {
          announce(barrier, STAGE_BYTES);
          fetch(stage, weights, group * GROUP, tile * ROWS, barrier);
        }
        fetch(stage + WEIGHT_BYTES, tokens, group * GROUP, 0, barrier);
        fetch_scale(scales + ring.stage * SCALES + TOKENS, sw + (i64)tile * sw_stride + group);
      }
      for (int token = lane; token < T; token += 32) {
        fetch_scale(scales + ring.stage * SCALES + token, sx + (i64)group * sx_stride + token);
      }
      arrive_with_scales(barrier);
    }
    return;
  }

  Ring ring;
  for (int unit = begin; unit < end;) {
    const int tile = unit / groups, from = unit % groups;
    const int count = min(groups - from, end - unit);
    float total[PARTS];
    multiply(total, ring, count, memory, scales, full, empty);
    unit += count;
    if (from > 0) {  // another block finishes it
      float4* mine = reinterpret_cast<float4*>(left + (i64)block * PARTS * MULTIPLIERS);
#pragma unroll
      for (int i = 0; i < PARTS; i += 4) {
        mine[i / 4 * MULTIPLIERS + thread] =
            make_float4(total[i], total[i + 1], total[i + 2], total[i + 3]);
      }
      meet_multipliers();
      if (thread == 0) set_flag(flags + block, 1);
      continue;
    }
    for (int other = block + 1, done = count; done < groups; other++) {
      done += min(groups - done, begins(other + 1, blocks, units) - begins(other, blocks, units));
      await_flag(flags + other);
      const float4* theirs =
          reinterpret_cast<const float4*>(left + (i64)other * PARTS * MULTIPLIERS);
#pragma unroll
      for (int i = 0; i < PARTS; i += 4) {
        const float4 x = theirs[i / 4 * MULTIPLIERS + thread];
        total[i] += x.x, total[i + 1] += x.y, total[i + 2] += x.z, total[i + 3] += x.w;
      }
      meet_multipliers();
      if (thread == 0) set_flag(flags + other, 0);
    }
    put(out, reinterpret_cast<u16*>(memory + HELD), total, T, OUT, tile * ROWS);
  }
}
