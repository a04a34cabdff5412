// What the two kernels of GDN decode share: gdn_prepare.cu makes the coefficients of one step's
// tokens, gdn_answer.cu passes over the state. decode.py says what goes between them; it puts
// common.cuh and this file before either. Compile-time: N tokens, W window rows, DK, DV, RATIO, QKV_BF16,
// STATE_BF16, STATE_FP16, KEY_BF16, GATE_BF16, RAW (gates come as the projections a and b), CONV
// (queries, keys and values come as the projection, and are still to be convolved), BLOCKS of the
// second kernel on a multiprocessor, AHEAD (it asks for states at once).

constexpr int NEW = 2 * N * W, STATE = NEW + 2 * N * N, BETA = STATE + 2 * N;
constexpr int SHARE = BETA + N, OWN = SHARE + W, SIZE = OWN + 1;

#if QKV_BF16
typedef u16 qkv_t;
#else
typedef float qkv_t;
#endif
struct half_t {  // a float16; u16 alone is a bfloat16
  u16 bits;
};
#if STATE_FP16
typedef half_t state_t;
#elif STATE_BF16
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

#ifndef EMULATED  // what the CPU twin in the tests stands in for
// 16 bytes to shared memory, there after wait_copies and a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two float16, rounded to nearest; what is beyond their range becomes their largest number.
__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 d;
  low = fminf(fmaxf(low, -65504.f), 65504.f), high = fminf(fmaxf(high, -65504.f), 65504.f);
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void mma(float* d, const float* a, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#endif

// Four values, from how they lie in memory. The last argument is there for its type.
__device__ __forceinline__ void open(uint2 raw, float* x, const u16*) {
  x[0] = __uint_as_float(raw.x << 16), x[1] = __uint_as_float(raw.x & 0xffff0000u);
  x[2] = __uint_as_float(raw.y << 16), x[3] = __uint_as_float(raw.y & 0xffff0000u);
}

__device__ __forceinline__ void open(uint2 raw, float* x, const half_t*) {
  x[0] = from_half((u16)raw.x), x[1] = from_half((u16)(raw.x >> 16));
  x[2] = from_half((u16)raw.y), x[3] = from_half((u16)(raw.y >> 16));
}

__device__ __forceinline__ void open(float4 raw, float* x, const float*) {
  x[0] = raw.x, x[1] = raw.y, x[2] = raw.z, x[3] = raw.w;
}

__device__ __forceinline__ uint2 get4(const u16* at) { return *reinterpret_cast<const uint2*>(at); }
__device__ __forceinline__ uint2 get4(const half_t* at) {
  return *reinterpret_cast<const uint2*>(at);
}
__device__ __forceinline__ float4 get4(const float* at) {
  return *reinterpret_cast<const float4*>(at);
}

template <int COUNT, typename T>
__device__ __forceinline__ void load(const T* at, float* x) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) open(get4(at + i), x + i, at);
}

__device__ __forceinline__ void store4(float* at, const float* x) {
  *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store4(u16* at, const float* x) {
  *reinterpret_cast<uint2*>(at) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

__device__ __forceinline__ float high(float x) {
  return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

// d += a b on tensor cores, m16n8k8 in tf32, with the operands that are not exact in it split in
// two: that keeps 21 bits of them.
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
