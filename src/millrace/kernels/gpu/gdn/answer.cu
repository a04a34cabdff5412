// The pass over the state, once the coefficients are there (gdn_prepare.cu).
//
// A thread holds its part of the state as it lies in memory. If AHEAD, it asks for all of it at once,
// before the kernel in front has ended; else the compiler may spread that over the products. BLOCKS on
// a multiprocessor, which leave a thread that many registers, say how many bytes are under way.
//
// A warp owns 32 value channels of one row and value head, a block all of the head's. Rows 0..7 of
// a product are the keys of the row's tokens, rows 8..15 their queries. Which channel an index of a
// fragment stands for is ours to choose:
//   lane = 4 g + l; inner index (step, l, h) is row (l * rows / 4 + 2 * step + h) of the operand,
//   so that a lane's probes are neighbours in memory; column n of tile j is value channel 4 n + j,
//   so that a lane loads four tiles' entries at once and its results are channels 8 l .. 8 l + 7.

constexpr int WP = (W + 7) / 8 * 8;  // window rows, padded
constexpr bool NARROW = STATE_BF16 || STATE_FP16;  // 16 bits, all of which tf32 holds
#if STATE_BF16 || STATE_FP16
typedef uint2 piece;  // four channels of a row, as they lie in memory
#else
typedef float4 piece;
#endif

__device__ __forceinline__ void store8(float* at, const float* x) {
  store4(at, x);
  store4(at + 4, x + 4);
}

__device__ __forceinline__ void store8(u16* at, const float* x) {
  *reinterpret_cast<uint4*>(at) =
      make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

__device__ __forceinline__ void store8(half_t* at, const float* x) {
  *reinterpret_cast<uint4*>(at) = make_uint4(pack_half(x[0], x[1]), pack_half(x[2], x[3]),
                                             pack_half(x[4], x[5]), pack_half(x[6], x[7]));
}

// A lane's part of the window's u: rows l * WP / 4 + i, channels 4 g .. of the warp's.
typedef float Window[WP][DV + 4];  // by rows that fall on other banks than their neighbours

__device__ __forceinline__ void past(float (*u)[4], const Window& window, int filled, int v, int l) {
#pragma unroll
  for (int i = 0; i < WP / 4; i++) {
    const int at = l * (WP / 4) + i;
    u[i][0] = u[i][1] = u[i][2] = u[i][3] = 0.f;
    if (at < filled) load<4>(&window[at][v], u[i]);
  }
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

extern "C" __global__ void __launch_bounds__(DV, BLOCKS)
    gdn_answer(const qkv_t* qkv, state_t* state, float* window_u, const int* fill,
               const i64* slots, const float* coefs, const float* old_keys, qkv_t* out,
               int qkv_stride, int HK, int HV) {
  const int vh = blockIdx.x, row = blockIdx.y, kh = vh / RATIO;
  const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4, v0 = threadIdx.x / 32 * 32;
  const i64 slot = slots[row], head = slot * HV + vh;
  if (slot == 0) return;  // the row is padding, and has no tokens
  state += head * DK * DV + v0;
  window_u += head * W * DV + v0;

  if (!AHEAD) await_previous();
  piece s[DK / 4];  // rows l * DK / 4 + i of the state, channels 4 g ..
#pragma unroll
  for (int i = 0; i < DK / 4; i++) s[i] = get4(state + (l * (DK / 4) + i) * DV + 4 * g);

  const int filled = min(fill[slot], W);
  const bool full = filled + N > W, token = g < N;
  const int t = token ? g : 0;
  __shared__ __align__(16) Window window;  // a warp's channels are its own
#pragma unroll 1
  for (int i = lane; i < filled * 8; i += 32) {
    copy_async(&window[i / 8][v0 + i % 8 * 4], window_u + i / 8 * DV + i % 8 * 4);
  }
  if (AHEAD) await_previous();  // states are there, coefficients and probes need not be yet
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
      float b[2][4];
      open(s[i + e], b[0], state), open(s[i + e + 1], b[1], state);
#pragma unroll
      for (int j = 0; j < 4; j++) product<!QKV_BF16, !NARROW>(y[j], a, b[0][j], b[1][j]);
    }
  }
  const float key_scale = coef[STATE + t], query_scale = coef[STATE + N + t];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    y[j][0] *= key_scale, y[j][1] *= key_scale, y[j][2] *= query_scale, y[j][3] *= query_scale;
  }
  wait_copies();
  __syncwarp();
  float u_old[WP / 4][4];
  past(u_old, window, filled, v0 + 4 * g, l);
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
