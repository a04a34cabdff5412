// GEMMs with weights of 4 bits: a panel is unpacked where it is used, then rows meet it as in gemm.h.
//
// A weight is (value of its code - zero) * (scale * factor), in float32, rounded to the dtype of x. So
// results are the same bits as those of a weight that was dequantized before.
#pragma once

#include "gemm.h"

namespace {

struct W4 {
    const int32_t* codes;    // [columns, n / 8]: eight codes a word, the lowest bits first
    const uint16_t* scales;  // float16 [columns, groups]
    const float* factor;     // [columns]
    const uint8_t* zeros;    // [columns, groups]; null: `values` has them in it
    const float* values;     // [16], of the codes
    int n, group, groups;
};

#ifdef __AVX512BF16__

// 16 codes' values; the lowest 4 bits of each lane count.
inline Floats values_of(__m512 values, __m512i codes) {
    return (Floats)_mm512_permutexvar_ps(codes, values);
}

// Two channels of 16 columns as the panel has them.
struct ToBf16 {
    typedef Bf16Pairs Unit;
    static void put(Words (*panel)[2], int half, int pair, Floats low, Floats high) {
        static const __m512i turns = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
            19, 3, 18, 2, 17, 1, 16, 0);
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        panel[pair][half] = (Words)_mm512_permutexvar_epi16(turns, both);
    }
};
struct ToFloat {
    typedef FloatWords Unit;
    static void put(Words (*panel)[2], int half, int pair, Floats low, Floats high) {
        panel[2 * pair][half] = (Words)low;
        panel[2 * pair + 1][half] = (Words)high;
    }
};

// 16 of a column's groups from `first` on, as float32.
inline Floats scales_of(const W4& w, int64_t column, int first, __mmask16 there) {
    auto stored = _mm256_maskz_loadu_epi16(there, w.scales + column * w.groups + first);
    return (Floats)_mm512_cvtph_ps(stored) * w.factor[column];
}
inline Floats zeros_of(const W4& w, int64_t column, int first, __mmask16 there) {
    auto stored = _mm_maskz_loadu_epi8(there, w.zeros + column * w.groups + first);
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(stored));
}

// to[group][2]: a panel's scales, or its zeros, by groups.
template <class Of> void by_group(const W4& w, int c, int count, Of of, Floats* to) {
    for (int half = 0; half < 2; half++)
        for (int first = 0; first < w.groups; first += LANES) {
            Words block[LANES];
            int valid = std::min(LANES, w.groups - first);
            __mmask16 there = valid == LANES ? 0xFFFF : (1 << valid) - 1;
            for (int i = 0; i < LANES; i++) {
                int column = half * LANES + i;
                block[i] = column < count ? (Words)of(w, c + column, first, there) : Words{};
            }
            transpose(block);
            for (int i = 0; i < valid; i++) to[2 * (first + i) + half] = (Floats)block[i];
        }
}

// The panel of columns [c, c + count). ZEROS: there are some. room: for scales and zeros.
template <class To, bool ZEROS>
void unpack_panel(const W4& w, int c, int count, Words (*panel)[2], std::vector<Floats>& room) {
    room.resize(std::max(room.size(), size_t(4 * w.groups)));
    Floats *scales = room.data(), *zeros = scales + 2 * w.groups;
    by_group(w, c, count, scales_of, scales);
    if (ZEROS) by_group(w, c, count, zeros_of, zeros);
    const __m512 values = _mm512_loadu_ps(w.values);
    const int words = w.n / 8, of_group = w.group / 8;
    for (int half = 0; half < 2; half++) {
        int g = 0, left = of_group;  // the group of the next word, and how many words it has left
        for (int first = 0; first < words; first += LANES) {
            Words block[LANES];
            int valid = std::min(LANES, words - first);
            __mmask16 there = valid == LANES ? 0xFFFF : (1 << valid) - 1;
            for (int i = 0; i < LANES; i++) {
                int column = half * LANES + i;
                block[i] = Words{};
                if (column >= count) continue;
                auto from = w.codes + int64_t(c + column) * words + first;
                __builtin_prefetch((const char*)from + int64_t(PANEL) * words * 4, 0, 2);
                block[i] = (Words)_mm512_maskz_loadu_epi32(there, from);
            }
            transpose(block);
            for (int i = 0; i < valid; i++, left--) {
                if (!left) g++, left = of_group;
                const Floats scale = scales[2 * g + half], zero = zeros[2 * g + half];
                const auto codes = (__m512i)block[i];
#pragma GCC unroll 4
                for (int pair = 0; pair < 4; pair++) {
                    Floats low = values_of(values, _mm512_srli_epi32(codes, 8 * pair));
                    Floats high = values_of(values, _mm512_srli_epi32(codes, 8 * pair + 4));
                    if (ZEROS) low -= zero, high -= zero;
                    To::put(panel, half, 4 * (first + i) + pair, low * scale, high * scale);
                }
            }
        }
    }
}

template <class T> inline void store_rows(T* out, Floats x, int count);
template <> inline void store_rows(bf16* out, Floats x, int count) { store_some(out, x, count); }
template <> inline void store_rows(float* out, Floats x, int count) {
    __mmask16 those = count >= LANES ? 0xFFFF : (1 << std::max(count, 0)) - 1;
    _mm512_mask_storeu_ps(out, those, (__m512)x);
}

template <class To>
void w4_linear(const W4& w, const void* x, int rows, int columns, void* out, int threads) {
    typedef typename To::Unit U;
    typedef typename U::Element T;
    int64_t work = int64_t(rows) * columns * w.n;
    share((columns + PANEL - 1) / PANEL, work > 32 * SMALL ? threads : 1, [&](int task) {
        static thread_local std::vector<Words> scratch;
        static thread_local std::vector<Floats> room;
        scratch.resize(std::max(scratch.size(), size_t(2 * w.n / U::STEP)));
        auto panel = (Words(*)[2])scratch.data();
        int c = task * PANEL, count = std::min(PANEL, columns - c);
        if (w.zeros) unpack_panel<To, true>(w, c, count, panel, room);
        else unpack_panel<To, false>(w, c, count, panel, room);
        in_runs(rows, [&](auto run, int first) {
            constexpr int R = decltype(run)::value;
            Floats total[R][2] = {};
            meet<U, R>((const T*)x + int64_t(first) * w.n, w.n, panel, w.n, total);
            for (int r = 0; r < R; r++) {
                T* to = (T*)out + int64_t(first + r) * columns + c;
                store_rows(to, total[r][0], count);
                store_rows(to + LANES, total[r][1], count - LANES);
            }
        });
    });
}
#endif

}  // namespace

// out[rows, columns] = x[rows, n] w[columns, n]^T, n a multiple of 8. Returns 0 if this processor has
// no bfloat16 instructions.
extern "C" int millrace_w4_linear(const void* x, const int32_t* codes, const uint16_t* scales,
                                  const float* factor, const uint8_t* zeros, const float* values,
                                  void* out, int rows, int columns, int n, int group, int groups,
                                  int is_bf16, int threads) {
#ifdef __AVX512BF16__
    W4 w = {codes, scales, factor, zeros, values, n, group, groups};
    if (is_bf16) w4_linear<ToBf16>(w, x, rows, columns, out, threads);
    else w4_linear<ToFloat>(w, x, rows, columns, out, threads);
    return 1;
#else
    return 0;
#endif
}
