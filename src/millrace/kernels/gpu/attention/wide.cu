// Attention of prompts over contiguous float16 keys and values, for Hopper: heads of 256 channels.
//
// A block owns a tile of 128 tokens of a row and one query head. One thread has blocks of BN keys
// and values fetched into rings of STAGES; two groups of four warps own 64 tokens each. Scores are
// products out of shared memory; shares of them stay in registers as the operand of the products
// with values. Those of one block run on the tensor cores while the softmax of the next is computed.
//
// Every query sees key 0, and blocks go up from there: so a maximum is finite from the first block
// on. What lies past a row's end may hold anything: such scores are masked, such values set to zero.
// BN, STAGES, scores() and shares() are given.

constexpr int M = 128, D = 256, HALF = 64, PANEL = 64;  // channels of a panel: 128 bytes a row
constexpr int PANELS = D / PANEL, S_PARTS = BN / 2, O_PARTS = D / 2;  // sums of a thread
constexpr int CONSUMERS = 256, WARPS = CONSUMERS / 32, PRODUCERS = 128;
constexpr int Q_PANEL = HALF * 128, Q_BYTES = M * D * 2;
constexpr int KV_PANEL = BN * 128, KV_BYTES = PANELS * KV_PANEL;
constexpr int KEYS = Q_BYTES, VALUES = KEYS + STAGES * KV_BYTES;
constexpr int BARRIERS = VALUES + STAGES * KV_BYTES;
constexpr long long LONGEST_WAIT = 4000000000ll;  // cycles; then it fails by a store to address 0

typedef unsigned long long u64;

#ifndef EMULATED  // what the CPU twin in the tests stands in for
#define NOTHING __int_as_float(0xff800000)
#define CONSTANT const __grid_constant__
struct __align__(64) TensorMap {
  unsigned long long opaque[16];
};


__device__ __forceinline__ u32 shared(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void open_barrier(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}

__device__ __forceinline__ void announce(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool is_over(u64* barrier, u32 parity) {
  u32 over;
  asm volatile(
      "{ .reg .pred over;\n"
      "mbarrier.try_wait.parity.shared.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over; }"
      : "=r"(over)
      : "r"(shared(barrier)), "r"(parity)
      : "memory");
  return over;
}

// A store, for with `trap` in it ptxas allots registers as if there were no setmaxnreg, and spills.
__device__ __forceinline__ void await(u64* barrier, u32 parity) {
  if (is_over(barrier, parity)) return;
  const long long began = clock64();
  while (!is_over(barrier, parity)) {
    if (clock64() - began > LONGEST_WAIT) asm volatile("st.global.u32 [%0], 0;" ::"l"(0ull));
  }
}

// BN rows of 64 channels; rows past the end of the matrix are zeros.
__device__ __forceinline__ void fetch(u8* to, const TensorMap& map, int channel, int row,
                                      u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared(to)),
      "l"(&map), "r"(channel), "r"(row), "r"(shared(barrier))
      : "memory");
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PARTS>
__device__ __forceinline__ void pin(float* sums) {  // nothing moves these across
#pragma unroll
  for (int i = 0; i < PARTS; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int LEFT>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
template <int BARRIER, int THREADS>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
template <int COUNT>
__device__ __forceinline__ void pin_shares(u32* P) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(P[i])::"memory");
}
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
}
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
}
__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// Rows of 128 bytes, 8 of them to 1,024, swizzled; apart: bytes between panels of 64 channels, for
// the operand that is read across rows.
__device__ __forceinline__ u64 described(const u8* at, u32 apart) {
  return (u64)(shared(at) >> 4 & 0x3fff) | (u64)(apart >> 4) << 16 | (u64)(1024 >> 4) << 32 |
         (u64)1 << 62;
}

// 64 rows of queries, bfloat16 in memory, to shared memory in float16, swizzled; zeros past `rows`.
__device__ __forceinline__ void put_queries(u8* to, const u16* q, i64 stride, int rows, int thread) {
  for (int i = thread; i < HALF * (D / 8); i += 128) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (row < rows) x = *reinterpret_cast<const uint4*>(q + row * stride + chunk * 8);
    u32* pair = reinterpret_cast<u32*>(&x);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      pair[j] = pack_half(__uint_as_float(pair[j] << 16), __uint_as_float(pair[j] & 0xffff0000u));
    }
    const int panel = chunk / 8, at = (chunk % 8) ^ (row % 8);
    *reinterpret_cast<uint4*>(to + panel * Q_PANEL + row * 128 + at * 16) = x;
  }
}

// S = Q K^T of a block, under way when this returns.
__device__ __forceinline__ void start_scores(float* S, const u8* q, const u8* k) {
  pin<S_PARTS>(S);
  begin_products();
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    scores(S, described(q + i / 4 * Q_PANEL, 16) + i % 4 * 2,
           described(k + i / 4 * KV_PANEL, 16) + i % 4 * 2, i > 0);
  }
  commit();
}

// O += P V of a block, under way when this returns.
__device__ __forceinline__ void start_shares(float* O, const u32* P, const u8* v) {
  begin_products();
#pragma unroll
  for (int i = 0; i < BN / 16; i++) {
    shares(O, P + 4 * i, described(v + i * 2048, KV_PANEL));
  }
  commit();
}

struct Softmax {  // of a thread's two rows
  float most[2], mass[2], shrink[2];

  // S becomes shares. Keys at or past limit[row] of the block are masked.
  __device__ __forceinline__ void join(float* S, float scale, bool masked, const int* limit,
                                       int l) {
    if (masked) {
#pragma unroll
      for (int i = 0; i < S_PARTS; i++) {
        if (i / 4 * 8 + 2 * l + i % 2 >= limit[i / 2 % 2]) S[i] = NOTHING;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = S[2 * r];
#pragma unroll
      for (int i = 0; i < S_PARTS; i += 4) top = fmaxf(top, fmaxf(S[i + 2 * r], S[i + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float now = fmaxf(most[r], top * scale);
      shrink[r] = power(most[r] - now);
      most[r] = now;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < S_PARTS; i += 4) {
        S[i + 2 * r] = power(S[i + 2 * r] * scale - now);
        S[i + 2 * r + 1] = power(S[i + 2 * r + 1] * scale - now);
        sum += S[i + 2 * r] + S[i + 2 * r + 1];
      }
      mass[r] = mass[r] * shrink[r] + sum;
    }
  }
};

__device__ __forceinline__ void pack_shares(u32* P, const float* S) {
#pragma unroll
  for (int i = 0; i < S_PARTS / 2; i++) P[i] = pack_half(S[2 * i], S[2 * i + 1]);
}

struct Ring {
  int stage = 0;
  u32 turn = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, turn ^= 1;
  }
};

// Rows `from` and on of a block of values become zeros, for both groups.
__device__ __forceinline__ void clear_values(u8* v, int from, int thread) {
  for (int i = thread; i < PANELS * (BN - from) * 8; i += CONSUMERS) {
    const int row = from + i / 8 % (BN - from), panel = i / 8 / (BN - from);
    *reinterpret_cast<uint4*>(v + panel * KV_PANEL + row * 128 + i % 8 * 16) =
        make_uint4(0, 0, 0, 0);
  }
  show_to_products();
  meet<1, CONSUMERS>();
}

__device__ __forceinline__ void produce(u8* memory, u64* full, u64* empty, const TensorMap& keys,
                                        const TensorMap& values, int column, int own, int blocks) {
  Ring ring;
  for (int block = 0; block < blocks; block++, ring.next()) {
#pragma unroll
    for (int v = 0; v < 2; v++) {
      u64 *there = full + v * STAGES + ring.stage, *free = empty + v * STAGES + ring.stage;
      u8* to = memory + (v ? VALUES : KEYS) + ring.stage * KV_BYTES;
      await(free, ring.turn ^ 1);
      announce(there, KV_BYTES);
#pragma unroll
      for (int p = 0; p < PANELS; p++) {
        fetch(to + p * KV_PANEL, v ? values : keys, column + p * PANEL, own + block * BN, there);
      }
    }
  }
}

// keys, values: float16 [all, kv_heads * D] in boxes of BN rows and 64 channels. q, out: bfloat16,
// tokens q_stride and heads * D elements apart. tiles: row and number, TILES of each. scale: a
// float's bits, in powers of two.
extern "C" __global__ void __launch_bounds__(PRODUCERS + CONSUMERS, 1)
    attend_wide(CONSTANT TensorMap keys, CONSTANT TensorMap values,
                const u16* q, const STARTS* starts, const OFFSETS* offsets, const int* wide_at,
                const int* tiles, u16* out, int q_stride, int TILES, int heads, int group,
                u32 scale_bits) {
#ifndef EMULATED
  extern __shared__ u8 unaligned[];
#endif
  u8* memory = unaligned + (1024 - shared(unaligned) % 1024) % 1024;
  const int head = blockIdx.x, number = TILES - 1 - blockIdx.y, row = tiles[number];
  if (row < 0) return;  // all threads of the block: nobody waits for one that has left
  const int own = wide_at[row];
  if (own < 0) return;
  const int begin = (int)offsets[row], count = (int)offsets[row + 1] - begin;
  const int start = (int)starts[row], first = tiles[TILES + number] * M;
  if (first >= count) return;
  const int high = start + min(first + M, count), blocks = (high + BN - 1) / BN;
  u64* full = reinterpret_cast<u64*>(memory + BARRIERS);  // keys', then values'
  u64* empty = full + 2 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; i++) open_barrier(full + i, 1), open_barrier(empty + i, WARPS);
    show_barriers();
  }
  __syncthreads();

  if (threadIdx.x < PRODUCERS) {
    leave_registers();
    if (threadIdx.x == 0) {
      produce(memory, full, empty, keys, values, head / group * D, own, blocks);
    }
    return;
  }
  take_registers();
  const int thread = threadIdx.x - PRODUCERS, half = thread / 128, lane = thread % 32, l = lane % 4;
  const int mine = first + half * HALF, token = thread % 128 / 32 * 16 + lane / 4;
  const float scale = __uint_as_float(scale_bits);
  u8* queries = memory + half * (Q_BYTES / 2);
  put_queries(queries, q + (i64)(begin + mine) * q_stride + head * D, q_stride, count - mine,
              thread % 128);
  show_to_products();
  half ? meet<3, 128>() : meet<2, 128>();

  float S[S_PARTS], O[O_PARTS];
  u32 P[S_PARTS / 2] = {};
#pragma unroll
  for (int i = 0; i < S_PARTS; i++) S[i] = 0.f;
#pragma unroll
  for (int i = 0; i < O_PARTS; i++) O[i] = 0.f;
  Softmax softmax = {{NOTHING, NOTHING}, {0.f, 0.f}, {0.f, 0.f}};
  Ring ring;  // of the keys; values are a block behind
  for (int block = 0; block < blocks; block++) {
    const Ring before = {ring.stage == 0 ? STAGES - 1 : ring.stage - 1,
                         ring.stage == 0 ? ring.turn ^ 1 : ring.turn};
    await(full + ring.stage, ring.turn);
    start_scores(S, queries, memory + KEYS + ring.stage * KV_BYTES);
    if (block > 0) {
      await(full + STAGES + before.stage, before.turn);
      start_shares(O, P, memory + VALUES + before.stage * KV_BYTES);
      await_products<1>();
    } else {
      await_products<0>();
    }
    pin<S_PARTS>(S);
    if (lane == 0) arrive(empty + ring.stage);
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      limit[r] = min(start + mine + token + 8 * r + 1, high) - block * BN;
    }
    softmax.join(S, scale, (block + 1) * BN > start + mine + 1, limit, l);
    pin<S_PARTS>(S);  // for overlap; ptxas 13.5 still waits before the exponentials
    await_products<0>();
    pin<O_PARTS>(O);
    pin_shares<S_PARTS / 2>(P);
    if (block > 0 && lane == 0) arrive(empty + STAGES + before.stage);
#pragma unroll
    for (int i = 0; i < O_PARTS; i++) O[i] *= softmax.shrink[i / 2 % 2];
    pack_shares(P, S);
    if (block + 1 < blocks) ring.next();
  }
  await(full + STAGES + ring.stage, ring.turn);
  u8* last = memory + VALUES + ring.stage * KV_BYTES;
  if (high % BN) clear_values(last, high % BN, thread);
  pin<O_PARTS>(O);
  start_shares(O, P, last);
  await_products<0>();
  pin<O_PARTS>(O);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float mass = softmax.mass[r];
    mass += __shfl_xor_sync(0xffffffffu, mass, 1);
    mass += __shfl_xor_sync(0xffffffffu, mass, 2);
    const float by = 1.f / mass;
    const int t = mine + token + 8 * r;
    if (t >= count) continue;
    u32* to = reinterpret_cast<u32*>(out + ((i64)(begin + t) * heads + head) * D) + l;
#pragma unroll
    for (int i = 0; i < O_PARTS; i += 4) {
      to[i] = pack(O[i + 2 * r] * by, O[i + 2 * r + 1] * by);
    }
  }
}
