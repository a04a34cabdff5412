// GDN decode in two kernels: coefficients of one step's tokens, then one pass over the state.
// gdn_decode.py says what passes between them; compile-time: N tokens, W window rows, DK, DV, RATIO,
// QKV_BF16, STATE_BF16, KEY_BF16, GATE_BF16, RAW (gates come as the projections a and b).

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

constexpr int WP = (W + 7) / 8 * 8;  // window rows, padded
constexpr int NEW = 2 * N * W, STATE = NEW + 2 * N * N, BETA = STATE + 2 * N;
constexpr int SHARE = BETA + N, OWN = SHARE + W, SIZE = OWN + 1;

#if QKV_BF16
typedef u16 qkv_t;
#else
typedef float qkv_t;
#endif
#if STATE_BF16
typedef u16 state_t;
#else
typedef float state_t;
#endif
#if KEY_BF16
typedef u16 key_t;
#else
typedef float key_t;
#endif
#if GATE_BF16
typedef u16 gate_t;
#else
typedef float gate_t;
#endif

__device__ __forceinline__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float widen(float x) { return x; }

__device__ __forceinline__ void put(float* at, float x) { *at = x; }
__device__ __forceinline__ void put(u16* at, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*at) : "f"(x));
}

__device__ __forceinline__ u32 pack(float low, float high) {  // two bfloat16, rounded to nearest
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// --- coefficients ------------------------------------------------------------------------------

// Everything of one row and key head that does not touch the state. Probe p is the key of token p
// for p < N, else the query of token p - N; dots holds raw products, which `scale` normalises.
extern "C" __global__ void __launch_bounds__(128)
    gdn_prepare(const qkv_t* qkv, const gate_t* g, const gate_t* beta, const float* a_log,
                const float* dt_bias, key_t* window_k, float* window_g, const int* fill,
                const i64* slots, float* coefs, float* old_keys, int qkv_stride, int gate_stride,
                int HK, int HV) {
  const int kh = blockIdx.x, row = blockIdx.y, me = threadIdx.x, lane = me % 32;
  const i64 slot = slots[row];
  const int filled = min(fill[slot], W);
  const bool full = filled + N > W;
  const int place = full ? 0 : filled;
  window_k += (slot * HK + kh) * W * DK;
  window_g += (slot * HV + kh * RATIO) * W;
  old_keys += ((i64)row * HK + kh) * W * DK;
  __shared__ float probe[2 * N][DK], dots[2 * N][W + 2 * N], scale[2 * N];
  __shared__ float old_log[RATIO][W], log_a[RATIO][N], betas[RATIO][N], decay[RATIO];

  for (int i = me; i < 2 * N * DK; i += 128) {
    const int p = i / DK;
    const i64 at = ((i64)row * N + p % N) * qkv_stride + ((p < N ? HK : 0) + kh) * DK;
    probe[p][i % DK] = widen(qkv[at + i % DK]);
  }
  for (int i = me; i < RATIO * W; i += 128) {
    old_log[i / W][i % W] = i % W < filled ? window_g[i] : 0.f;
  }
  for (int i = me; i < RATIO * N; i += 128) {
    const int vh = kh * RATIO + i / N;
    const i64 at = ((i64)row * N + i % N) * gate_stride + vh;
    float step = widen(g[at]), b = widen(beta[at]);
#if RAW
    step += dt_bias[vh];
    step = -expf(a_log[vh]) * (step > 20.f ? step : log1pf(expf(step)));
    b = 1.f / (1.f + expf(-b));
#endif
    log_a[i / N][i % N] = step;
    betas[i / N][i % N] = b;
  }
  __syncthreads();

  for (int r = me / 32; r < W + 2 * N; r += 4) {  // a warp per row: window keys, then probes
    if (r >= filled && r < W) continue;
    float sum[2 * N] = {};
#pragma unroll
    for (int d = lane; d < DK; d += 32) {
      const float x = r < W ? widen(window_k[r * DK + d]) : probe[r - W][d];
      if (full && r < W) old_keys[r * DK + d] = x;
#pragma unroll
      for (int p = 0; p < 2 * N; p++) sum[p] += x * probe[p][d];
    }
#pragma unroll
    for (int p = 0; p < 2 * N; p++) {
#pragma unroll
      for (int far = 16; far; far /= 2) sum[p] += __shfl_xor_sync(0xffffffffu, sum[p], far);
      if (lane == 0) dots[p][r] = sum[p];
    }
  }
  if (me < RATIO) {  // log A before the row, and after each of its tokens
    float log = filled ? old_log[me][filled - 1] : 0.f;
    decay[me] = log;
    for (int t = 0; t < N; t++) log_a[me][t] = log += log_a[me][t];
  }
  __syncthreads();
  if (me < 2 * N) {
    scale[me] = rsqrtf(dots[me][W + me] + 1e-6f) * (me < N ? 1.f : rsqrtf((float)DK));
  }
  __syncthreads();

  coefs += ((i64)row * HV + kh * RATIO) * SIZE;
  for (int i = me; i < RATIO * 2 * N * (W + N); i += 128) {
    const int j = i / (2 * N * (W + N)), p = i / (W + N) % (2 * N), c = i % (W + N), t = p % N;
    const int s = c - W;
    if (c < W) {
      const float a = c < filled ? expf(log_a[j][t] - old_log[j][c]) : 0.f;
      coefs[j * SIZE + p * W + c] = c < filled ? a * dots[p][c] * scale[p] : 0.f;
    } else {
      const bool before = s < t || (p >= N && s == t);
      const float a = before ? expf(log_a[j][t] - log_a[j][s]) : 0.f;
      coefs[j * SIZE + NEW + p * N + s] = before ? a * dots[p][W + s] * scale[p] * scale[s] : 0.f;
    }
  }
  for (int i = me; i < RATIO * 2 * N; i += 128) {
    const int j = i / (2 * N), p = i % (2 * N);
    coefs[j * SIZE + STATE + p] = expf(log_a[j][p % N]) * scale[p];
    if (p < N) {
      coefs[j * SIZE + BETA + p] = betas[j][p];
      window_g[j * W + place + p] = log_a[j][p] - (full ? decay[j] : 0.f);
    }
  }
  for (int i = me; i < RATIO * (W + 1); i += 128) {
    const int j = i / (W + 1), w = i % (W + 1);
    if (w == W) coefs[j * SIZE + OWN] = expf(decay[j]);
    if (w < filled) coefs[j * SIZE + SHARE + w] = expf(decay[j] - old_log[j][w]);
  }
  for (int i = me; i < N * DK; i += 128) {
    put(window_k + place * DK + i, probe[i / DK][i % DK] * scale[i / DK]);
  }
}

// --- the pass over the state -------------------------------------------------------------------

// A warp owns 32 value channels of one row and value head, a block all of the head's. Products run
// on tensor cores as m16n8k8 in tf32: rows 0..7 of a product are the keys of the row's tokens, rows
// 8..15 their queries. bfloat16 probes and states are exact in tf32; a float32 operand is split in
// two, which keeps 21 bits of it. Which channel an index of a fragment stands for is ours to choose:
//   lane = 4 g + l; inner index (step, l, h) is row (l * rows / 4 + 2 * step + h) of the operand, so
//   that a lane's probes are neighbours in memory; column n of tile j is value channel 4 n + j, so
//   that a lane loads four tiles' entries at once and its results are channels 8 l .. 8 l + 7.

template <int COUNT>
__device__ __forceinline__ void load(const u16* at, float* x) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    uint2 raw = *reinterpret_cast<const uint2*>(at + i);
    x[i] = __uint_as_float(raw.x << 16);
    x[i + 1] = __uint_as_float(raw.x & 0xffff0000u);
    x[i + 2] = __uint_as_float(raw.y << 16);
    x[i + 3] = __uint_as_float(raw.y & 0xffff0000u);
  }
}

template <int COUNT>
__device__ __forceinline__ void load(const float* at, float* x) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    float4 raw = *reinterpret_cast<const float4*>(at + i);
    x[i] = raw.x, x[i + 1] = raw.y, x[i + 2] = raw.z, x[i + 3] = raw.w;
  }
}

__device__ __forceinline__ void store8(float* at, const float* x) {
  reinterpret_cast<float4*>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store8(u16* at, const float* x) {
  *reinterpret_cast<uint4*>(at) =
      make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

__device__ __forceinline__ float high(float x) {
  return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

__device__ __forceinline__ void mma(float* d, const float* a, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// d += a b, with the operands that are not exact in tf32 split.
template <bool SPLIT_A, bool SPLIT_B>
__device__ __forceinline__ void product(float* d, const float* a, float b0, float b1) {
  float ah[4], al[4];
#pragma unroll
  for (int i = 0; i < 4; i++) ah[i] = SPLIT_A ? high(a[i]) : a[i], al[i] = a[i] - ah[i];
  float h0 = SPLIT_B ? high(b0) : b0, h1 = SPLIT_B ? high(b1) : b1;
  mma(d, ah, h0, h1);
  if (SPLIT_B) mma(d, ah, b0 - h0, b1 - h1);
  if (SPLIT_A) mma(d, al, h0, h1);
}

// The state after the window: own * S + sum_i share_i key_i u_i^T, for the warp's channels.
__device__ __forceinline__ void fold(state_t* state, const float* old_keys, const float* coef,
                                     const float (*u)[4], int filled, int g, int l) {
  const float own = coef[OWN];
  float share[WP / 4];
#pragma unroll
  for (int i = 0; i < WP / 4; i++) {
    const int row = l * (WP / 4) + i;
    share[i] = row < filled ? coef[SHARE + row] : 0.f;
  }
#pragma unroll 1
  for (int k = g; k < DK; k += 16) {
    float c[2][8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      load<8>(state + (k + 8 * half) * DV + 8 * l, c[half]);
#pragma unroll
      for (int e = 0; e < 8; e++) c[half][e] *= own;
    }
    float d[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      d[j][0] = c[0][j], d[j][1] = c[0][4 + j], d[j][2] = c[1][j], d[j][3] = c[1][4 + j];
    }
#pragma unroll
    for (int step = 0; step < WP / 8; step++) {
      float a[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = 2 * step + h, row = l * (WP / 4) + i;
        const bool live = row < filled;
        a[2 * h] = live ? old_keys[row * DK + k] * share[i] : 0.f;
        a[2 * h + 1] = live ? old_keys[row * DK + k + 8] * share[i] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        product<true, true>(d[j], a, u[2 * step][j], u[2 * step + 1][j]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float x[8];
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = d[j][2 * half], x[4 + j] = d[j][2 * half + 1];
      store8(state + (k + 8 * half) * DV + 8 * l, x);
    }
  }
}

extern "C" __global__ void __launch_bounds__(DV, 3)
    gdn_answer(const qkv_t* qkv, state_t* state, float* window_u, const int* fill,
               const i64* slots, const float* coefs, const float* old_keys, qkv_t* out,
               int qkv_stride, int HK, int HV) {
  const int vh = blockIdx.x, row = blockIdx.y, kh = vh / RATIO;
  const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4, v0 = threadIdx.x / 32 * 32;
  const i64 slot = slots[row], head = slot * HV + vh;
  state += head * DK * DV + v0;
  window_u += head * W * DV + v0;

  float s[DK / 4][4];  // rows l * DK / 4 + i of the state, channels 4 g ..
#pragma unroll
  for (int i = 0; i < DK / 4; i++) load<4>(state + (l * (DK / 4) + i) * DV + 4 * g, s[i]);

  const int filled = min(fill[slot], W);
  const bool full = filled + N > W, token = g < N;
  const int t = token ? g : 0;
  float u_old[WP / 4][4];
#pragma unroll
  for (int i = 0; i < WP / 4; i++) {
    const int at = l * (WP / 4) + i;
    u_old[i][0] = u_old[i][1] = u_old[i][2] = u_old[i][3] = 0.f;
    if (at < filled) load<4>(window_u + at * DV + 4 * g, u_old[i]);
  }
  const float* coef = coefs + ((i64)row * HV + vh) * SIZE;
  const qkv_t* x = qkv + ((i64)row * N + t) * qkv_stride;
  const qkv_t* query = x + kh * DK + l * (DK / 4);
  const qkv_t* key = query + HK * DK;

  float y[4][4] = {};  // [tile][key of channel 2 l, of 2 l + 1, query of each], by token g
#pragma unroll
  for (int i = 0; i < DK / 4; i += 8) {
    float k8[8] = {}, q8[8] = {};
    if (token) load<8>(key + i, k8), load<8>(query + i, q8);
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float a[4] = {k8[e], q8[e], k8[e + 1], q8[e + 1]};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        product<!QKV_BF16, !STATE_BF16>(y[j], a, s[i + e][j], s[i + e + 1][j]);
      }
    }
  }
  const float key_scale = coef[STATE + t], query_scale = coef[STATE + N + t];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    y[j][0] *= key_scale, y[j][1] *= key_scale, y[j][2] *= query_scale, y[j][3] *= query_scale;
  }
#pragma unroll
  for (int step = 0; step < WP / 8; step++) {
    float a[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at = l * (WP / 4) + 2 * step + h;
      const bool live = token && at < filled;
      a[2 * h] = live ? coef[t * W + at] : 0.f;
      a[2 * h + 1] = live ? coef[(N + t) * W + at] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      product<true, true>(y[j], a, u_old[2 * step][j], u_old[2 * step + 1][j]);
    }
  }

  // u of token s is final once the tokens before it have been taken off; lane 4 s + l holds it.
  const float beta = coef[BETA + t];
  float u[8], o[8];
  load<8>(x + 2 * HK * DK + vh * DV + v0 + 8 * l, u);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u[j] = beta * (u[j] - y[j][0]), u[4 + j] = beta * (u[4 + j] - y[j][1]);
    o[j] = y[j][2], o[4 + j] = y[j][3];
  }
#pragma unroll
  for (int before = 0; before < N; before++) {
    const float taken = before < t ? beta * coef[NEW + t * N + before] : 0.f;
    const float given = before <= t ? coef[NEW + (N + t) * N + before] : 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float past = __shfl_sync(0xffffffffu, u[e], 4 * before + l);
      o[e] += given * past;
      u[e] -= taken * past;
    }
  }
  if (full) {
    fold(state, old_keys + ((i64)row * HK + kh) * W * DK, coef, u_old, filled, g, l);
  }
  if (token) {
    store8(window_u + ((full ? 0 : filled) + g) * DV + 8 * l, u);
    store8(out + (((i64)row * N + g) * HV + vh) * DV + v0 + 8 * l, o);
  }
}
