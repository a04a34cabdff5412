// The causal convolution of four taps with silu, and the inputs that it keeps.
#pragma once

#include "pool.h"

namespace {

constexpr int BLOCK = 256;  // channels that run together

// Channels c .. c + n of one row of `count` tokens; the last `keep` inputs are stored.
template <class T>
void convolve(const T* x, int64_t stride, T* buffer, int channels, const float* weight, int offset,
              int count, int keep, int c, int n, T* out) {
    float lines[4][BLOCK], taps[4][BLOCK];
    for (int j = 0; j < 4; j++) to_floats(weight + j * channels + c, taps[j], n);
    for (int j = 0; j < 3; j++) to_floats(buffer + (offset + j) * channels + c, lines[j], n);
    // The buffer then holds inputs number count + 3 - keep .. count + 2, old ones being 0 .. 2.
    int from = count + 3 - keep;
    for (int j = from; j < 3; j++) from_floats(lines[j], buffer + (j - from) * channels + c, n);
    for (int t = 0; t < count; t++) {
        float *l0 = lines[t % 4], *l1 = lines[(t + 1) % 4], *l2 = lines[(t + 2) % 4];
        float* l3 = lines[(t + 3) % 4];
        const T* input = x + t * stride + c;
        T* result = out + int64_t(t) * channels + c;
        to_floats(input, l3, n);
#pragma omp simd
        for (int i = 0; i < n; i++)
            put(result + i, silu(taps[0][i] * l0[i] + taps[1][i] * l1[i] + taps[2][i] * l2[i] +
                                 taps[3][i] * l3[i]));
        if (t + 3 >= from) from_floats(l3, buffer + (t + 3 - from) * channels + c, n);
    }
}

template <class T>
void convolve_all(const T* x, int64_t stride, T* conv, int depth, int channels, const T* weight,
                  const int32_t* conv_offset, const int64_t* slots, const int32_t* offsets,
                  int rows, int keep, T* out, int threads) {
    std::vector<float> taps(4 * channels);
    for (int c = 0; c < channels; c++)
        for (int j = 0; j < 4; j++) taps[j * channels + c] = get(weight[4 * c + j]);
    int blocks = (channels + BLOCK - 1) / BLOCK;
    int64_t work = int64_t(offsets[rows]) * channels;
    share(rows * blocks, work > SMALL ? threads : 1, [&](int task) {
        int row = task / blocks, c = task % blocks * BLOCK;
        convolve(x + offsets[row] * stride, stride, conv + slots[row] * depth * channels, channels,
                 taps.data(), depth == 3 ? 0 : conv_offset[slots[row]],
                 offsets[row + 1] - offsets[row], keep, c, std::min(BLOCK, channels - c),
                 out + int64_t(offsets[row]) * channels);
    });
}

}  // namespace

extern "C" void millrace_conv(const void* x, int64_t stride, void* conv, int depth, int channels,
                              const void* weight, const int32_t* conv_offset, const int64_t* slots,
                              const int32_t* offsets, int rows, int keep, void* out, int is_bf16,
                              int threads) {
#define MILLRACE_CONV(T)                                                                      \
    convolve_all((const T*)x, stride, (T*)conv, depth, channels, (const T*)weight, conv_offset, \
                 slots, offsets, rows, keep, (T*)out, threads)
    if (is_bf16) MILLRACE_CONV(bf16);
    else MILLRACE_CONV(float);
#undef MILLRACE_CONV
}
