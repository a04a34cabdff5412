// What every op needs: numbers in float32, bfloat16 and e4m3, vectors of 16, exp, dot products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int SMALL = 1 << 15;  // elements below which waking another thread costs more

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
struct bf16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Floats load(const bf16* p) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
    return (Floats)wide;
}
// Exponent and mantissa are shifted into float32's fields; the factor corrects the exponent bias, also
// for subnormals. All ones is a NaN.
inline Floats load(const e4m3* p) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Words);
    Words size = wide & 0x7F;
    Floats value = (Floats)(size << 20) * 0x1p120f;
    return (Floats)((Words)value | (wide & 0x80) << 24 | ((Words)(size == 0x7F) & 0x7FC00000));
}
inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    p->bits = uint16_t(x == x ? rounded : 0x7FC0);
}

// exp to about 2 ulp, in a form that compilers vectorise; 0 if the result is not a normal float32.
inline float fast_exp(float x) {
    float clamped = std::min(std::max(x, -87.0f), 88.0f);
    float shifted = clamped * 1.44269504f + 12582912.0f;
    float whole = shifted - 12582912.0f;
    float r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    float out = p * scale;
    out = x < -87.0f ? 0.0f : out;
    return x == x ? out : x;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }

inline float sum(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}
typedef float Four __attribute__((vector_size(16)));
// The horizontal sums of four vectors.
inline Four horizontal_sums(Floats a, Floats b, Floats c, Floats d) {
#ifdef __AVX512F__
    auto pair = [](__m512 x, __m512 y) {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    };
    __m512d ab = pair((__m512)a, (__m512)b), cd = pair((__m512)c, (__m512)d);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    __m256 low = _mm512_castps512_ps256(all);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    __m256 half = _mm256_add_ps(low, high);
    return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
    return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}
template <class T> inline float dot(const float* a, const T* b, int n) {
    Floats total = {};
    for (int i = 0; i < n; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}
// out[i] = a . at(i) for i < count, four at a time; n: a multiple of LANES.
template <class At> inline void dots(const float* a, At at, int count, int n, float* out) {
    int i = 0;
    for (; i + 4 <= count; i += 4) {
        auto *b = at(i), *c = at(i + 1), *d = at(i + 2), *e = at(i + 3);
        Floats total[4] = {};
        for (int j = 0; j < n; j += LANES) {
            Floats x = load(a + j);
            total[0] += x * load(b + j);
            total[1] += x * load(c + j);
            total[2] += x * load(d + j);
            total[3] += x * load(e + j);
        }
        Four four = horizontal_sums(total[0], total[1], total[2], total[3]);
        std::memcpy(out + i, &four, sizeof four);
    }
    for (; i < count; i++) out[i] = dot(a, at(i), n);
}
template <class T> inline float sum_of_squares(const T* x, int n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; i++) total += get(x[i]) * get(x[i]);
    return total;
}
template <class T> inline void to_floats(const T* x, float* out, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = get(x[i]);
}
template <class T> inline void from_floats(const float* x, T* out, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, x[i]);
}
inline void read(const void* x, int is_bf16, int64_t at, float* out, int n) {
    if (is_bf16) to_floats(static_cast<const bf16*>(x) + at, out, n);
    else to_floats(static_cast<const float*>(x) + at, out, n);
}
inline void write(void* x, int is_bf16, int64_t at, const float* from, int n) {
    if (is_bf16) from_floats(from, static_cast<bf16*>(x) + at, n);
    else from_floats(from, static_cast<float*>(x) + at, n);
}
inline float read_one(const void* x, int is_bf16, int64_t at) {
    return is_bf16 ? get(static_cast<const bf16*>(x)[at]) : static_cast<const float*>(x)[at];
}

}  // namespace
