// Gated DeltaNet in the window form; the equations stand in millrace/kernels/gdn.py.
#pragma once

#include "base.h"

namespace {

constexpr int CHUNK = 16;  // prompt tokens that advance together

// out[M, WIDE] = probes[M, rows] times state columns. The state is read once.
template <int M, int WIDE>
void probe_block(const float* state, int rows, int columns, const float* probes, float* out) {
    Floats total[M][WIDE] = {};
    for (int row = 0; row < rows; row++) {
        Floats s[WIDE];
        for (int i = 0; i < WIDE; i++) s[i] = load(state + row * columns + i * LANES);
        for (int m = 0; m < M; m++) {
            Floats probe = probes[m * rows + row] - (Floats){};
            for (int i = 0; i < WIDE; i++) total[m][i] += probe * s[i];
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < WIDE; i++) store(out + m * columns + i * LANES, total[m][i]);
}
template <int M, int WIDE>
void probe_columns(const float* state, int rows, int columns, const float* probes, float* out) {
    int c = 0;
    for (; c + WIDE * LANES <= columns; c += WIDE * LANES)
        probe_block<M, WIDE>(state + c, rows, columns, probes, out + c);
    for (; c < columns; c += LANES)
        probe_block<M, 1>(state + c, rows, columns, probes, out + c);
}
// out[m, columns] = probes[m, rows] state[rows, columns], m even.
void probe(const float* state, int rows, int columns, const float* probes, int m, float* out) {
    int i = 0;
    for (; i + 8 <= m; i += 8)
        probe_columns<8, 2>(state, rows, columns, probes + i * rows, out + i * columns);
    for (; i + 4 <= m; i += 4)
        probe_columns<4, 4>(state, rows, columns, probes + i * rows, out + i * columns);
    for (; i < m; i += 2)
        probe_columns<2, 8>(state, rows, columns, probes + i * rows, out + i * columns);
}

template <int WIDE>
void fold_block(float* state, int columns, float decay, const float* k, int key_dim,
                const float* u, int n) {
    Floats a[WIDE], b[WIDE];
    for (int i = 0; i < WIDE; i++) {
        a[i] = decay * load(state + i * LANES);
        b[i] = decay * load(state + columns + i * LANES);
    }
    for (int t = 0; t < n; t++) {
        Floats ka = k[t * key_dim] - (Floats){}, kb = k[t * key_dim + 1] - (Floats){};
        for (int i = 0; i < WIDE; i++) {
            Floats row = load(u + t * columns + i * LANES);
            a[i] += ka * row;
            b[i] += kb * row;
        }
    }
    for (int i = 0; i < WIDE; i++) {
        store(state + i * LANES, a[i]);
        store(state + columns + i * LANES, b[i]);
    }
}
// state = A state + sum_i A/A_i k_i u_i^T over n tokens; scaled: room for n * key_dim floats.
void fold(float* state, int key_dim, int value_dim, const float* k, const float* u,
          const float* log_a, int n, float* scaled) {
    if (!n) return;
    for (int t = 0; t < n; t++) {
        float share = std::exp(log_a[n - 1] - log_a[t]);
        for (int i = 0; i < key_dim; i++) scaled[t * key_dim + i] = share * k[t * key_dim + i];
    }
    float decay = std::exp(log_a[n - 1]);
    for (int row = 0; row < key_dim; row += 2) {
        float* s = state + row * value_dim;
        int c = 0;
        for (; c + 8 * LANES <= value_dim; c += 8 * LANES)
            fold_block<8>(s + c, value_dim, decay, scaled + row, key_dim, u + c, n);
        for (; c < value_dim; c += LANES)
            fold_block<1>(s + c, value_dim, decay, scaled + row, key_dim, u + c, n);
    }
}

struct Sizes {
    int key_heads, value_heads, key_dim, value_dim;
    int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// A thread's copies: keys and queries of n tokens, a window of w, and what they make together.
struct Room {
    std::vector<float> probes, window_k, pairs, old, scaled, state, v, out;
    Room(const Sizes& z, int n, int w)
        : probes(2 * n * z.key_dim), window_k(w * z.key_dim), pairs(2 * n * (w + n)),
          old(2 * n * z.value_dim), scaled(std::max(n, w) * z.key_dim),
          state(z.key_dim * z.value_dim), v(n * z.value_dim), out(n * z.value_dim) {}
};

void normalise(float* x, int n, float scale) {
    float factor = scale / std::sqrt(sum_of_squares(x, n) + 1e-6f);
    for (int i = 0; i < n; i++) x[i] *= factor;
}

// Keys, then queries, of one head for n tokens, normalised.
void read_probes(const void* qkv, int kind, int64_t token, int64_t stride, int head, int n,
                 const Sizes& z, float* probes) {
    for (int t = 0; t < n; t++) {
        float *k = probes + t * z.key_dim, *q = probes + (n + t) * z.key_dim;
        int64_t at = (token + t) * stride;
        read(qkv, kind, at + head * z.key_dim, q, z.key_dim);
        read(qkv, kind, at + (z.key_heads + head) * z.key_dim, k, z.key_dim);
        normalise(q, z.key_dim, 1 / std::sqrt(float(z.key_dim)));
        normalise(k, z.key_dim, 1);
    }
}

// pairs[2n, w + n]: every probe with the window's keys and the n new ones.
void pair_up(const Room& room, int key_dim, int n, int w, float* pairs) {
    const float *old = room.window_k.data(), *fresh = room.probes.data();
    for (int m = 0; m < 2 * n; m++, pairs += w + n) {
        const float* p = fresh + m * key_dim;
        dots(p, [&](int i) { return old + i * key_dim; }, w, key_dim, pairs);
        dots(p, [&](int i) { return fresh + i * key_dim; }, m % n + 1, key_dim, pairs + w);
    }
}

inline void add_scaled(float* out, float scale, const float* x, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] += scale * x[i];
}

// Outputs, u and log A of n tokens of one value head after a window of w. u, log_a: the window's
// rows and behind them the new ones. log_a holds g in the new rows on entry.
void advance(const float* state, const Sizes& z, Room& room, int n, int w, float* u, float* log_a,
             const float* beta, float* out) {
    int dv = z.value_dim;
    float decay = w ? log_a[w - 1] : 0.0f;
    float* old = room.old.data();
    probe(state, z.key_dim, dv, room.probes.data(), 2 * n, old);
    for (int t = 0; t < n; t++) {
        float now = decay += log_a[w + t];
        log_a[w + t] = now;
        const float *kd = room.pairs.data() + t * (w + n), *qd = kd + n * (w + n);
        float *from_k = old + t * dv, *from_q = old + (n + t) * dv, *mine = u + (w + t) * dv;
        float share = std::exp(now);
        for (int i = 0; i < dv; i++) from_k[i] *= share, from_q[i] *= share;
        for (int i = 0; i < w + t; i++) {
            float since = std::exp(now - log_a[i]);
            add_scaled(from_k, kd[i] * since, u + i * dv, dv);
            add_scaled(from_q, qd[i] * since, u + i * dv, dv);
        }
        const float* v = room.v.data() + t * dv;
        for (int i = 0; i < dv; i++) mine[i] = beta[t] * (v[i] - from_k[i]);
        for (int i = 0; i < dv; i++) out[t * dv + i] = from_q[i] + qd[w + t] * mine[i];
    }
}

}  // namespace

extern "C" {

// a and b are g and beta where a_log is null. window: rows in a slot's window.
void millrace_gdn_decode(const void* qkv, const void* a, const void* b, const float* a_log,
                         const float* bias, void* state, void* window_k, float* window_u,
                         float* window_g, const int32_t* fill, const int64_t* slots, void* out,
                         int bf16_qkv, int bf16_gates, int bf16_state, int bf16_window, int rows,
                         int n, int window, int64_t qkv_stride, int64_t gate_stride,
                         int key_heads, int value_heads, int key_dim, int value_dim, int threads) {
    Sizes z{key_heads, value_heads, key_dim, value_dim};
    int ratio = value_heads / key_heads, tile = key_dim * value_dim;
#pragma omp parallel num_threads(threads)
    {
        Room room(z, n, window);
        std::vector<float> beta(n);
#pragma omp for schedule(static)
        for (int task = 0; task < rows * key_heads; task++) {
            int row = task / key_heads, kh = task % key_heads;
            int64_t slot = slots[row], token = int64_t(row) * n;
            int filled = fill[slot], w = filled + n > window ? 0 : filled;
            int64_t keys = (slot * key_heads + kh) * window * key_dim;
            read(window_k, bf16_window, keys, room.window_k.data(), filled * key_dim);
            read_probes(qkv, bf16_qkv, token, qkv_stride, kh, n, z, room.probes.data());
            pair_up(room, key_dim, n, w, room.pairs.data());
            write(window_k, bf16_window, keys + w * key_dim, room.probes.data(), n * key_dim);
            for (int vh = kh * ratio; vh < (kh + 1) * ratio; vh++) {
                int64_t head = slot * value_heads + vh;
                float *u = window_u + head * window * value_dim, *log_a = window_g + head * window;
                float* s = static_cast<float*>(state) + head * tile;
                if (bf16_state) read(state, 1, head * tile, s = room.state.data(), tile);
                if (w < filled) {
                    fold(s, key_dim, value_dim, room.window_k.data(), u, log_a, filled,
                         room.scaled.data());
                    if (bf16_state) {  // what later steps will read
                        write(state, 1, head * tile, s, tile);
                        read(state, 1, head * tile, s, tile);
                    }
                }
                for (int t = 0; t < n; t++) {
                    int64_t at = (token + t) * gate_stride + vh;
                    float x = read_one(a, bf16_gates, at), y = read_one(b, bf16_gates, at);
                    if (a_log) {
                        x += bias[vh];
                        x = -std::exp(a_log[vh]) * (x > 20 ? x : std::log1p(std::exp(x)));
                        y = 1 / (1 + std::exp(-y));
                    }
                    log_a[w + t] = x, beta[t] = y;
                    read(qkv, bf16_qkv,
                         (token + t) * qkv_stride + 2 * key_heads * key_dim + vh * value_dim,
                         room.v.data() + t * value_dim, value_dim);
                }
                advance(s, z, room, n, w, u, log_a, beta.data(), room.out.data());
                for (int t = 0; t < n; t++)
                    write(out, bf16_qkv, ((token + t) * value_heads + vh) * value_dim,
                          room.out.data() + t * value_dim, value_dim);
            }
        }
    }
}

void millrace_gdn_prefill(const void* qkv, const float* g, const float* beta, void* state,
                          const int64_t* slots, const int32_t* offsets, void* out, int bf16_qkv,
                          int bf16_state, int rows, int64_t qkv_stride, int64_t gate_stride,
                          int key_heads, int value_heads, int key_dim, int value_dim,
                          int threads) {
    Sizes z{key_heads, value_heads, key_dim, value_dim};
    int ratio = value_heads / key_heads, tile = key_dim * value_dim;
#pragma omp parallel num_threads(threads)
    {
        Room room(z, CHUNK, 0);
        std::vector<float> states(ratio * tile), u(CHUNK * value_dim);
        float log_a[CHUNK], betas[CHUNK];
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < rows * key_heads; task++) {
            int row = task / key_heads, kh = task % key_heads;
            int64_t first = (slots[row] * value_heads + kh * ratio) * tile;
            read(state, bf16_state, first, states.data(), ratio * tile);
            for (int token = offsets[row]; token < offsets[row + 1]; token += CHUNK) {
                int n = std::min(CHUNK, offsets[row + 1] - token);
                read_probes(qkv, bf16_qkv, token, qkv_stride, kh, n, z, room.probes.data());
                pair_up(room, key_dim, n, 0, room.pairs.data());
                for (int r = 0; r < ratio; r++) {
                    int vh = kh * ratio + r;
                    int64_t values = 2 * key_heads * key_dim + vh * value_dim;
                    for (int t = 0; t < n; t++) {
                        log_a[t] = g[(token + t) * gate_stride + vh];
                        betas[t] = beta[(token + t) * gate_stride + vh];
                        read(qkv, bf16_qkv, (token + t) * qkv_stride + values,
                             room.v.data() + t * value_dim, value_dim);
                    }
                    float* s = states.data() + r * tile;
                    advance(s, z, room, n, 0, u.data(), log_a, betas, room.out.data());
                    fold(s, key_dim, value_dim, room.probes.data(), u.data(), log_a, n,
                         room.scaled.data());
                    for (int t = 0; t < n; t++)
                        write(out, bf16_qkv,
                              (int64_t(token + t) * value_heads + vh) * value_dim,
                              room.out.data() + t * value_dim, value_dim);
                }
            }
            write(state, bf16_state, first, states.data(), ratio * tile);
        }
    }
}

}  // extern "C"
