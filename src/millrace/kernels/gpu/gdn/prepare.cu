// All of a decode step that does not touch the state: the convolution (CONV), products of the
// tokens' keys and queries (the probes) with the window's keys and with each other, and what norms
// and decays make of these, the coefficients. It also writes the window's new keys and log A.
//
// A block owns one row and key head: RATIO value heads, whose channels are its own in the slot's
// buffer of past inputs. A thread has four of these channels. Sums across lanes would make this a
// kernel bound by instructions, so products are on tensor cores, 16 window keys or probes by 8
// probes: lane = 4 g + l holds rows g and g + 8 and column g, channels 16 j + 4 l .. + 3 of each.

constexpr int OWNED = 2 * DK + RATIO * DV;  // channels of a block
constexpr int THREADS = (OWNED / 4 + 31) / 32 * 32, WARPS = THREADS / 32;
constexpr int ROW = DK + 16;                // in shared memory: rows g fall on banks of their own
constexpr int WT = (W + 15) / 16 * 16, PT = (2 * N + 7) / 8 * 8;  // window rows, probes, in tiles
constexpr int LOGS = W + N;

#if QKV_BF16
typedef uint2 quad;  // four values, as they lie in memory
#else
typedef float4 quad;
#endif

#ifndef EMULATED
// Like Triton's y / (1 + exp(-y)), bit for bit. (Subnormal powers vanish beside 1.)
__device__ __forceinline__ float silu(float y) {
  float power, out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269502162933349609375f * y));
  asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(y), "f"(power + 1.f));
  return out;
}
#endif

__device__ __forceinline__ quad get(const qkv_t* at) { return get4(at); }
__device__ __forceinline__ void put(qkv_t* at, quad x) { *reinterpret_cast<quad*>(at) = x; }

// silu of the convolution of inputs [3 + N] for token t, rounded to qkv_t. The order of the sum is
// that of conv.py, and so are the bits. taps: of each of the four channels.
__device__ __forceinline__ quad convolve(const quad* inputs, const quad* taps) {
  float x[4][4], w[4][4], y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    open(inputs[i], x[i], (const qkv_t*)nullptr), open(taps[i], w[i], (const qkv_t*)nullptr);
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    y[e] = __fmaf_rn(x[0][e], w[e][0], __fmul_rn(x[1][e], w[e][1]));
    y[e] = silu(__fmaf_rn(x[3][e], w[e][3], __fmaf_rn(x[2][e], w[e][2], y[e])));
  }
  __align__(16) qkv_t out[4];
  store4(out, y);
  return get(out);
}

// f(i) for i < COUNT, dealt out to the block's threads from `first` on.
template <int COUNT, typename F>
__device__ __forceinline__ void deal(u32 first, F f) {
#pragma unroll
  for (int i = 0; i < COUNT; i += THREADS) {
    if (first + i < COUNT) f(first + i);
  }
}

// d += left right^T over DK channels, of 16 rows (8 unless LOWER) by 8; d is four partial sums.
template <bool SPLIT, bool LOWER, typename T>
__device__ __forceinline__ void meet(float (*d)[4], const T* left, const qkv_t* right, int g,
                                     int l) {
#pragma unroll
  for (int j = 0; j < DK / 16; j++) {
    const int at = g * ROW + 16 * j + 4 * l;
    float upper[4], lower[4] = {}, b[4];
    load<4>(left + at, upper);
    if (LOWER) load<4>(left + at + 8 * ROW, lower);
    load<4>(right + at, b);
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float a[4] = {upper[e], lower[e], upper[e + 1], lower[e + 1]};
      product<SPLIT, !QKV_BF16>(d[j % 2 * 2 + e / 2], a, b[e], b[e + 1]);
    }
  }
}

// log A after each token of a row, and its beta, of value heads first .. first + 3: lane 8 j + t.
__device__ __forceinline__ void gate(const gate_t* g, const gate_t* beta, const float* a_log,
                                     const float* dt_bias, const float* window_g,
                                     float (*logs)[LOGS], float* coefs, int token, int gate_stride,
                                     int head, int filled, int first, int lane) {
  const int j = first + lane / 8, t = lane % 8, vh = head + j;
  const bool live = j < RATIO && t < N;
  float step = 0.f, b = 0.f, before = 0.f;
  if (live) {
    const i64 at = (i64)(token + t) * gate_stride + vh;
    step = widen(g[at]), b = widen(beta[at]);
    if (filled) before = window_g[j * W + filled - 1];
#if RAW
    step += dt_bias[vh];
    step = -expf(a_log[vh]) * (step > 20.f ? step : log1pf(expf(step)));
    b = 1.f / (1.f + expf(-b));
#endif
  }
#pragma unroll
  for (int back = 1; back < N; back *= 2) {
    const float x = __shfl_up_sync(0xffffffffu, step, back, 8);
    if (t >= back) step += x;
  }
  if (live) {
    logs[j][W + t] = before + step;
    coefs[j * SIZE + BETA + t] = b;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gdn_prepare(const qkv_t* qkv, const qkv_t* weight, qkv_t* conv, const int* conv_offset,
                qkv_t* convolved, const gate_t* g, const gate_t* beta, const float* a_log,
                const float* dt_bias, key_t* window_k, float* window_g, const int* fill,
                const i64* slots, float* coefs, float* old_keys, int tokens, int qkv_stride,
                int conv_stride, int gate_stride, int HK, int HV) {
  const int kh = blockIdx.x, row = blockIdx.y;
  const u32 me = threadIdx.x, lane = me % 32, warp = me / 32;
  const int token = row * N, head = kh * RATIO;
  let_next_start();
  if (token + N > tokens) return;  // the row is padding, and nothing lies where it would
  __shared__ __align__(16) key_t keys[WT][ROW];
  __shared__ __align__(16) qkv_t probe[PT][ROW];      // key of token p for p < N, query of p - N
  __shared__ float dots[WT + 16][PT + 1], scale[PT];  // raw products, which `scale` normalises
  __shared__ float logs[RATIO][LOGS];                 // log A of the window's rows, then of tokens

  // What does not wait for the slot is asked for first.
  const u32 mine = 4 * me, part = mine / DK;  // 0: a query's channels, 1: a key's, else values'
  constexpr int TAKEN = CONV ? OWNED : 2 * DK;
  const bool works = TAKEN == 4 * THREADS || mine < TAKEN;
  const int channel = part < 2 ? (part * HK + kh) * DK + mine % DK
                               : 2 * HK * DK + head * DV + mine - 2 * DK;
  quad inputs[3 + N];
  if (works) {
    const qkv_t* x = qkv + ((i64)token * qkv_stride + channel);
#pragma unroll
    for (int t = 0; t < N; t++) inputs[3 + t] = get(x + t * qkv_stride);
  }
#if CONV
  quad taps[4];
  if (works) {
#pragma unroll
    for (int e = 0; e < 4; e++) taps[e] = get(weight + 4 * (channel + e));
  }
#endif
  const int slot = slots[row];
  if (slot == 0) return;  // the row is padding, and has no tokens
  const int filled = min(fill[slot], W);
  const bool full = filled + N > W;
  const int place = full ? 0 : filled;
#if CONV
  const int C = 2 * HK * DK + HV * DV;
  conv += (i64)slot * conv_stride + channel;
  if (works) {
    const qkv_t* old = conv + conv_offset[slot] * C;
#pragma unroll
    for (int i = 0; i < 3; i++) inputs[i] = get(old + i * C);
  }
#endif
  window_k += (i64)(slot * HK + kh) * (W * DK);
  window_g += (i64)(slot * HV + head) * W;
  coefs += (i64)(row * HV + head) * SIZE;
  constexpr int PIECE = 16 / sizeof(key_t);
#pragma unroll 1
  for (u32 i = me * PIECE; i < filled * DK; i += THREADS * PIECE) {
    copy_async(&keys[i / DK][i % DK], window_k + i);
  }
  if (warp == (WARPS - 1) / 2) {
#pragma unroll 1
    for (u32 i = lane; i < filled; i += 32) {
#pragma unroll
      for (int j = 0; j < RATIO; j++) logs[j][i] = window_g[j * W + i];
    }
  }
  if (warp == WARPS - 1) {
#pragma unroll
    for (int first = 0; first < RATIO; first += 4) {
      gate(g, beta, a_log, dt_bias, window_g, logs, coefs, token, gate_stride, head, filled, first,
           lane);
    }
  }
  if (works) {
#if CONV
    convolved += (i64)token * C + channel;
#pragma unroll
    for (int i = 1; i < 3 + N; i++) put(conv + (i - 1) * C, inputs[i]);
#endif
#pragma unroll
    for (int t = 0; t < N; t++) {
#if CONV
      const quad x = convolve(inputs + t, taps);
      put(convolved + t * C, x);
#else
      const quad x = inputs[3 + t];
#endif
      if (part < 2) put(&probe[part ? t : N + t][mine % DK], x);
    }
  }
  wait_copies();
  __syncthreads();

  for (u32 tile = warp; tile < (WT / 16 + 1) * (PT / 8); tile += WARPS) {
    const int from = tile % (WT / 16 + 1) * 16, column = tile / (WT / 16 + 1) * 8;
    const int g = lane / 4, l = lane % 4;
    const bool probes = from == WT;
    if (!probes && from >= filled) continue;
    float d[4][4] = {};
    if (probes) {
      meet<!QKV_BF16, (PT > 8)>(d, &probe[0][0], &probe[column][0], g, l);
    } else {
      meet<!KEY_BF16, true>(d, &keys[from][0], &probe[column][0], g, l);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) d[0][i] += d[1][i] + (d[2][i] + d[3][i]);
#pragma unroll
    for (int i = 0; i < 4; i++) dots[from + g + i / 2 * 8][column + 2 * l + i % 2] = d[0][i];
    if (probes && g / 2 == l) {  // the square of probe p
      const int p = column + g;
      const float even = column ? d[0][2] : d[0][0], odd = column ? d[0][3] : d[0][1];
      const float square = g % 2 ? odd : even;
      scale[p] = rsqrtf(square + 1e-6f) * (p < N ? 1.f : rsqrtf((float)DK));
    }
  }
  if (full) {
    old_keys += ((i64)row * HK + kh) * W * DK;
#pragma unroll 1
    for (u32 i = 4 * me; i < filled * DK; i += 4 * THREADS) {
      float x[4];
      load<4>(&keys[i / DK][i % DK], x);
      store4(old_keys + i, x);
    }
  }
  __syncthreads();

  deal<2 * N * LOGS>(me, [&](u32 i) {
    const int p = i / LOGS, c = i % LOGS, t = p % N, s = c - W;
    const bool window = c < W, live = window ? c < filled : s < t + (p >= N);
    const float dot = dots[window ? c : WT + s][p] * scale[p] * (window ? 1.f : scale[s]);
    float* out = coefs + (window ? p * W + c : NEW + p * N + s);
#pragma unroll
    for (int j = 0; j < RATIO; j++) {
      out[j * SIZE] = live ? expf(logs[j][W + t] - logs[j][c]) * dot : 0.f;
    }
  });
  // The rest is dealt out from other threads on.
  deal<W + 1>(THREADS - 1 - me, [&](u32 i) {  // shares of the window's rows in a fold, and its own
    if (i < W && i >= filled) return;
#pragma unroll
    for (int j = 0; j < RATIO; j++) {
      const float decay = filled ? logs[j][filled - 1] : 0.f;
      coefs[j * SIZE + (i < W ? SHARE + i : OWN)] = expf(decay - (i < W ? logs[j][i] : 0.f));
    }
  });
  deal<RATIO * 2 * N>((me + THREADS / 2) % THREADS, [&](u32 i) {
    const int j = i / (2 * N), p = i % (2 * N);
    const float log = logs[j][W + p % N];
    coefs[j * SIZE + STATE + p] = expf(log) * scale[p];
    if (p < N) window_g[j * W + place + p] = log - (full ? logs[j][filled - 1] : 0.f);
  });
  deal<N * DK / 4>(THREADS - 1 - me, [&](u32 i) {
    const int t = 4 * i / DK, at = 4 * i % DK;
    float x[4];
    load<4>(&probe[t][at], x);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] *= scale[t];
    store4(window_k + place * DK + 4 * i, x);
  });
}
