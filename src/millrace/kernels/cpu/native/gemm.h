// GEMMs on panels of 32 columns, packed so that a vector holds the same channel of 16 columns.
//
// A panel is packed where it is used and stays in the L1 cache while rows are multiplied with it. The
// result of a row and a column depends on these two only, so results are the same in any batch.
#pragma once

#include <type_traits>

#include "pool.h"

namespace {

constexpr int PANEL = 2 * LANES;
constexpr int MOST_ROWS = 12;  // rows multiplied at once: their sums fill the registers

// The inner step of row times panel. A word holds STEP channels of one column.
struct FloatWords {
    typedef float Element;
    static constexpr int STEP = 1;
    static Floats add(Floats total, const float* x, Words panel) {
        return total + (*x - (Floats){}) * (Floats)panel;
    }
};
#ifdef __AVX512BF16__
struct Bf16Pairs {
    typedef bf16 Element;
    static constexpr int STEP = 2;
    static Floats add(Floats total, const bf16* x, Words panel) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        return (Floats)_mm512_dpbf16_ps((__m512)total, both, (__m512bh)panel);
    }
};
#endif

// Transposes 16 rows of 16 words.
inline void transpose(Words r[LANES]) {
#ifdef __AVX512F__
    __m512i s[LANES], t[LANES];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            t[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + 2 + j]);
            t[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            s[8 * j + i] = _mm512_shuffle_i32x4(t[8 * j + i], t[8 * j + 4 + i], 0x88);
            s[8 * j + 4 + i] = _mm512_shuffle_i32x4(t[8 * j + i], t[8 * j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = (Words)_mm512_shuffle_i32x4(s[i], s[8 + i], 0x88);
        r[8 + i] = (Words)_mm512_shuffle_i32x4(s[i], s[8 + i], 0xdd);
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) std::swap(((uint32_t*)&r[i])[j], ((uint32_t*)&r[j])[i]);
#endif
}

// panel[word][PANEL] from `count` columns of `words` words, a multiple of 16; load(c, w): the words
// of column c from w on. Columns past `count` are zeros.
template <class Load> void pack_loaded(Load load, int count, int words, Words (*panel)[2]) {
    for (int half = 0; half < 2; half++)
        for (int w = 0; w < words; w += LANES) {
            Words block[LANES];
            for (int i = 0; i < LANES; i++) {
                int c = half * LANES + i;
                block[i] = c < count ? load(c, w) : Words{};
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) panel[w + i][half] = block[i];
        }
}

// As above; at(c): column c's words. ahead: distance from a column to that of the next panel.
template <class At>
void pack(At at, int count, int words, int64_t ahead, Words (*panel)[2]) {
    pack_loaded([&](int c, int w) {
        const char* words_of = (const char*)at(c) + w * 4;
        if (ahead) __builtin_prefetch(words_of + ahead, 0, 2);
        Words found;
        std::memcpy(&found, words_of, sizeof found);
        return found;
    }, count, words, panel);
}

#ifdef __AVX512BF16__
// 32 e4m3 numbers as bfloat16, exactly: what is not a sign is looked up.
struct Widen {
    __m512i table[4];
    Widen() {
        alignas(64) uint16_t found[128];
        for (int i = 0; i < 128; i++) {
            int exponent = i >> 3, mantissa = i & 7;
            float value = std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10);
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            found[i] = i == 127 ? 0x7FC0 : bits >> 16;
        }
        for (int i = 0; i < 4; i++) table[i] = _mm512_load_si512(found + 32 * i);
    }
    Words operator()(const uint8_t* codes) const {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
        __m512i small = _mm512_permutex2var_epi16(table[0], wide, table[1]);
        __m512i large = _mm512_permutex2var_epi16(table[2], wide, table[3]);
        __mmask32 is_large = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
        __m512i size = _mm512_mask_blend_epi16(is_large, small, large);
        __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(wide, 7), 15);
        return (Words)_mm512_or_si512(size, sign);
    }
};
#endif

// total[r] += x[r, n] times the panel.
template <class U, int R>
inline void meet(const typename U::Element* x, int64_t stride, const Words (*panel)[2], int n,
                 Floats total[R][2]) {
    for (int j = 0; j < n; j += U::STEP, panel++)
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++)
                total[r][half] = U::add(total[r][half], x + r * stride + j, (*panel)[half]);
}

template <int R, class Body> void with_rows(int count, Body body) {
    if constexpr (R > 0) {
        if (count >= R) body(std::integral_constant<int, R>());
        else with_rows<R - 1>(count, body);
    }
}
// body(R, r) for runs of R rows from r on, R a constant, until `rows` are done.
template <class Body> void in_runs(int rows, Body body) {
    for (int r = 0; r < rows; r += MOST_ROWS)
        with_rows<MOST_ROWS>(rows - r, [&](auto run) { body(run, r); });
}

#ifdef __AVX512BF16__
inline void store_some(bf16* out, Floats x, int count) {
    __mmask16 those = count >= LANES ? 0xFFFF : (1 << std::max(count, 0)) - 1;
    _mm256_mask_storeu_epi16(out, those, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

}  // namespace

namespace {

// The panels of a GEMM, as tasks of several threads.
template <class Body> void share_panels(int rows, int columns, int n, int threads, Body body) {
    int64_t work = int64_t(rows) * columns * n;
    share((columns + PANEL - 1) / PANEL, work > 32 * SMALL ? threads : 1, body);
}

// The rows of x in float32.
inline const float* as_floats(const float* x, int, int, std::vector<float>&) { return x; }
inline const float* as_floats(const bf16* x, int rows, int n, std::vector<float>& scratch) {
    scratch.resize(size_t(rows) * n);
    to_floats(x, scratch.data(), rows * n);
    return scratch.data();
}

// As below, in float32 inside, n a multiple of 16.
template <class T>
void linear_floats(const T* x, const T* weight, int rows, int columns, int n, T* out, int threads) {
    std::vector<float> copy;
    const float* inputs = as_floats(x, rows, n, copy);
    share_panels(rows, columns, n, threads, [&](int task) {
        static thread_local std::vector<Words> scratch;
        scratch.resize(std::max(scratch.size(), size_t(2) * n));
        auto panel = (Words(*)[2])scratch.data();
        int c = task * PANEL, count = std::min(PANEL, columns - c);
        pack_loaded([&](int i, int j) { return (Words)load(weight + int64_t(c + i) * n + j); },
                    count, n, panel);
        in_runs(rows, [&](auto run, int first) {
            constexpr int R = decltype(run)::value;
            Floats total[R][2] = {};
            meet<FloatWords, R>(inputs + int64_t(first) * n, n, panel, n, total);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < count; i++)
                    put(out + int64_t(first + r) * columns + c + i, total[r][i / LANES][i % LANES]);
        });
    });
}

}  // namespace

// out[rows, columns] = x[rows, n] w[columns, n]^T in float32, n a multiple of 16.
extern "C" void millrace_linear_floats(const void* x, const void* weight, int rows, int columns,
                                       int n, void* out, int is_bf16, int threads) {
    if (is_bf16)
        linear_floats((const bf16*)x, (const bf16*)weight, rows, columns, n, (bf16*)out, threads);
    else
        linear_floats((const float*)x, (const float*)weight, rows, columns, n, (float*)out, threads);
}

// out[rows, columns] = x[rows, n] w[columns, n]^T in bfloat16, n a multiple of 32. Returns 0 if this
// processor has no bfloat16 instructions.
extern "C" int millrace_linear(const void* x, const void* weight, int rows, int columns, int n,
                               void* out, int threads) {
#ifdef __AVX512BF16__
    share_panels(rows, columns, n, threads, [&](int task) {
        static thread_local std::vector<Words> scratch;
        scratch.resize(std::max(scratch.size(), size_t(n)));
        auto panel = (Words(*)[2])scratch.data();
        int c = task * PANEL, count = std::min(PANEL, columns - c);
        auto w = (const bf16*)weight + int64_t(c) * n;
        int64_t ahead = c + 2 * PANEL <= columns ? int64_t(PANEL) * n * sizeof(bf16) : 0;
        pack([&](int i) { return w + int64_t(i) * n; }, count, n / 2, ahead, panel);
        in_runs(rows, [&](auto run, int first) {
            constexpr int R = decltype(run)::value;
            Floats total[R][2] = {};
            meet<Bf16Pairs, R>((const bf16*)x + int64_t(first) * n, n, panel, n, total);
            for (int r = 0; r < R; r++) {
                bf16* to = (bf16*)out + int64_t(first + r) * columns + c;
                store_some(to, total[r][0], count);
                store_some(to + LANES, total[r][1], count - LANES);
            }
        });
    });
    return 1;
#else
    return 0;
#endif
}
