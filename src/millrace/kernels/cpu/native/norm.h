// Norms, gates, and rotary embedding with the KV store, each in one pass.
#pragma once

#include "pool.h"

namespace {

template <class T>
void norm_row(const T* x, const T* residual, const float* weight, float eps, int n, T* total,
              T* out) {
    if (residual)
        for (int i = 0; i < n; i++) put(total + i, get(x[i]) + get(residual[i]));
    const T* in = residual ? total : x;
    float scale = 1 / std::sqrt(sum_of_squares(in, n) / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, get(in[i]) * scale * weight[i]);
}
template <class T>
void gated_row(const T* o, const T* z, const float* weight, float eps, int n, T* out) {
    float scale = 1 / std::sqrt(sum_of_squares(o, n) / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, get(o[i]) * scale * weight[i] * silu(get(z[i])));
}
template <class T>
void silu_row(const T* gate_up, int n, T* out) {
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, silu(get(gate_up[i])) * get(gate_up[n + i]));
}
template <class T>
void sigmoid_row(const T* x, const T* gate, int n, T* out) {
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, get(x[i]) * sigmoid(get(gate[i])));
}

// Norm where there is a weight, then rotary embedding, of one head; scratch: dim floats.
template <class T>
void norm_rope(const T* x, const float* weight, float eps, const float* cos_sin, int rotary,
               int dim, float* scratch, T* out) {
    if (weight) {
        float scale = 1 / std::sqrt(sum_of_squares(x, dim) / dim + eps);
        for (int i = 0; i < dim; i++) put(out + i, get(x[i]) * scale * weight[i]);
    } else {
        for (int i = 0; i < dim; i++) out[i] = x[i];
    }
    to_floats(out, scratch, rotary);
    int half = rotary / 2;
    const float *cos = cos_sin, *sin = cos_sin + half;
    for (int i = 0; i < half; i++) {
        put(out + i, scratch[i] * cos[i] - scratch[half + i] * sin[i]);
        put(out + half + i, scratch[half + i] * cos[i] + scratch[i] * sin[i]);
    }
}
// A row of qkv has queries, then `gate` channels that are skipped, keys and values.
template <class T, class K>
void norm_rope_store_all(const T* qkv, int64_t stride, const float* qw, const float* kw, float eps,
                         const int64_t* positions, const float* cos_sin, int rotary, K* keys,
                         K* values, const int64_t* kv_rows, T* q, int tokens, int heads,
                         int kv_heads, int dim, int gate, int threads) {
    share_rows(tokens, (heads + kv_heads) * dim, threads, [&](int64_t t) {
        static thread_local std::vector<float> scratch;
        static thread_local std::vector<T> key;
        scratch.resize(dim), key.resize(dim);
        const T *in = qkv + t * stride, *k = in + heads * dim + gate, *v = k + kv_heads * dim;
        const float* angles = cos_sin + positions[t] * rotary;
        for (int h = 0; h < heads; h++)
            norm_rope(in + h * dim, qw, eps, angles, rotary, dim, scratch.data(),
                      q + (t * heads + h) * dim);
        for (int h = 0; h < kv_heads; h++) {
            int64_t at = (kv_rows[t] * kv_heads + h) * dim;
            norm_rope(k + h * dim, kw, eps, angles, rotary, dim, scratch.data(), key.data());
            for (int i = 0; i < dim; i++) put(keys + at + i, get(key[i]));
            for (int i = 0; i < dim; i++) put(values + at + i, get(v[h * dim + i]));
        }
    });
}

}  // namespace

extern "C" {

#define MILLRACE_EACH(call)                           \
    share_rows(rows, n, threads, [&](int64_t r) {     \
        if (is_bf16) { typedef bf16 T; call; }        \
        else { typedef float T; call; }               \
    })

void millrace_rms_norm(const void* x, const void* residual, const float* weight, float eps,
                       int64_t rows, int n, int64_t stride, void* total, void* out, int is_bf16,
                       int threads) {
    MILLRACE_EACH(norm_row((const T*)x + r * stride, residual ? (const T*)residual + r * n : nullptr,
                           weight, eps, n, (T*)total + r * n, (T*)out + r * n));
}
// z: rows of `heads` heads, a token's heads together.
void millrace_gated_rms_norm(const void* o, const void* z, int64_t z_stride, const float* weight,
                             float eps, int64_t rows, int heads, int n, void* out, int is_bf16,
                             int threads) {
    MILLRACE_EACH(gated_row((const T*)o + r * n,
                            (const T*)z + r / heads * z_stride + r % heads * n, weight, eps, n,
                            (T*)out + r * n));
}
void millrace_silu_mul(const void* gate_up, int64_t rows, int n, void* out, int is_bf16,
                       int threads) {
    MILLRACE_EACH(silu_row((const T*)gate_up + r * 2 * n, n, (T*)out + r * n));
}
void millrace_sigmoid_gate(const void* x, const void* gate, int64_t gate_stride, int64_t rows,
                           int n, void* out, int is_bf16, int threads) {
    MILLRACE_EACH(sigmoid_row((const T*)x + r * n, (const T*)gate + r * gate_stride, n,
                              (T*)out + r * n));
}

void millrace_norm_rope_store(const void* qkv, int64_t stride, const float* qw, const float* kw,
                              float eps, const int64_t* positions, const float* cos_sin,
                              int rotary, void* keys, void* values, const int64_t* kv_rows,
                              void* q, int is_bf16, int kv_bf16, int tokens, int heads,
                              int kv_heads, int dim, int gate, int threads) {
#define MILLRACE_STORE(T, K)                                                                   \
    norm_rope_store_all((const T*)qkv, stride, qw, kw, eps, positions, cos_sin, rotary,        \
                        (K*)keys, (K*)values, kv_rows, (T*)q, tokens, heads, kv_heads, dim,    \
                        gate, threads)
    if (is_bf16 && kv_bf16) MILLRACE_STORE(bf16, bf16);
    else if (is_bf16) MILLRACE_STORE(bf16, float);
    else if (kv_bf16) MILLRACE_STORE(float, bf16);
    else MILLRACE_STORE(float, float);
#undef MILLRACE_STORE
}

}  // extern "C"
