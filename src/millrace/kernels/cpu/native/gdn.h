// Gated DeltaNet in the window form; the equations are in millrace/kernels/gdn.py.
#pragma once

#include <type_traits>

#include "pool.h"

namespace {

constexpr int CHUNK = 16;  // prompt tokens that advance together

// out[M, WIDE] = probes[M, rows] times state columns. The state is read once; the next state is
// prefetched meanwhile, so that memory is never idle.
template <int M, int WIDE, class S>
void probe_block(const S* state, const S* next, int rows, int columns, const float* probes,
                 float* out) {
    Floats total[M][WIDE] = {};
    for (int row = 0; row < rows; row++, state += columns, next += columns) {
        Floats s[WIDE];
        for (int i = 0; i < WIDE; i++) {
            s[i] = load(state + i * LANES);
            if (i * sizeof(S) % sizeof(float) == 0) __builtin_prefetch(next + i * LANES, 0, 2);
        }
        for (int m = 0; m < M; m++) {
            Floats probe = probes[m * rows + row] - (Floats){};
            for (int i = 0; i < WIDE; i++) total[m][i] += probe * s[i];
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < WIDE; i++) store(out + m * columns + i * LANES, total[m][i]);
}
template <int M, int WIDE, class S>
void probe_columns(const S* state, const S* next, int rows, int columns, const float* probes,
                   float* out) {
    int c = 0;
    for (; c + WIDE * LANES <= columns; c += WIDE * LANES)
        probe_block<M, WIDE>(state + c, next + c, rows, columns, probes, out + c);
    for (; c < columns; c += LANES)
        probe_block<M, 1>(state + c, next + c, rows, columns, probes, out + c);
}
// out[m, columns] = probes[m, rows] state[rows, columns], m even. next: the state to prefetch.
template <class S>
void probe(const S* state, const S* next, int rows, int columns, const float* probes, int m,
           float* out) {
    int i = 0;
    for (; i + 8 <= m; i += 8)
        probe_columns<8, 2>(state, next, rows, columns, probes + i * rows, out + i * columns);
    for (; i + 4 <= m; i += 4)
        probe_columns<4, 4>(state, next, rows, columns, probes + i * rows, out + i * columns);
    for (; i < m; i += 2)
        probe_columns<2, 8>(state, next, rows, columns, probes + i * rows, out + i * columns);
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
// state = A state + sum_i A/A_i k_i u_i^T over n tokens; scaled: scratch for n * key_dim floats.
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
};

// A thread's copies: keys and queries of n tokens, a window of w tokens, and intermediate results.
struct Room {
    std::vector<float> probes, window_k, pairs, old, scaled, state, v, out, recent, weights,
        among, beta;
    Room(int key_dim, int value_dim, int n, int w)
        : probes(2 * n * key_dim), window_k(w * key_dim), pairs(2 * n * (w + n)),
          old(2 * n * value_dim), scaled(std::max(n, w) * key_dim), state(key_dim * value_dim),
          v(n * value_dim), out(n * value_dim), recent(2 * n * value_dim), weights(2 * n * w),
          among(2 * n * n), beta(n) {}
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
void pair_up(const Room& scratch, int key_dim, int n, int w, float* pairs) {
    const float *old = scratch.window_k.data(), *fresh = scratch.probes.data();
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
// rows and behind them the new ones. log_a holds g in the new rows on entry. next, next_u: the state
// and the window to prefetch.
template <class S>
void advance(const S* state, const S* next, const float* next_u, const Sizes& z, Room& scratch, int n,
             int w, float* u, float* log_a, const float* beta, float* out) {
    int dv = z.value_dim, all = w + n;
    float *old = scratch.old.data(), *recent = scratch.recent.data();
    float *weights = scratch.weights.data(), *among = scratch.among.data();  // [2n, w] and [2n, n]
    for (int t = 0; t < n; t++) log_a[w + t] += w + t ? log_a[w + t - 1] : 0.0f;
    // Bf16Pairs decay by as much as lies between the two.
    for (int m = 0; m < 2 * n; m++) {
        const float now = log_a[w + m % n], *pairs = scratch.pairs.data() + m * all;
#pragma omp simd
        for (int i = 0; i < w; i++) weights[m * w + i] = pairs[i] * fast_exp(now - log_a[i]);
#pragma omp simd
        for (int i = 0; i < n; i++)
            among[m * n + i] = pairs[w + i] * fast_exp(std::min(now - log_a[w + i], 0.0f));
    }
    probe(state, next, z.key_dim, dv, scratch.probes.data(), 2 * n, old);
    if (w) probe(u, next_u, w, dv, weights, 2 * n, recent);
    for (int t = 0; t < n; t++) {
        const float *kd = among + t * n, *qd = kd + n * n;
        float *from_k = old + t * dv, *from_q = old + (n + t) * dv, *mine = u + (w + t) * dv;
        float share = fast_exp(log_a[w + t]);
        for (int i = 0; i < dv; i++) from_k[i] *= share, from_q[i] *= share;
        if (w)
            for (int i = 0; i < dv; i++)
                from_k[i] += recent[t * dv + i], from_q[i] += recent[(n + t) * dv + i];
        for (int i = 0; i < t; i++) {
            add_scaled(from_k, kd[i], u + (w + i) * dv, dv);
            add_scaled(from_q, qd[i], u + (w + i) * dv, dv);
        }
        const float* v = scratch.v.data() + t * dv;
        for (int i = 0; i < dv; i++) mine[i] = beta[t] * (v[i] - from_k[i]);
        for (int i = 0; i < dv; i++) out[t * dv + i] = from_q[i] + qd[t] * mine[i];
    }
}

struct DecodeCall {
    const void *qkv, *a, *b;
    const float *a_log, *bias;
    void *state, *window_k;
    float *window_u, *window_g;
    const int32_t* fill;
    const int64_t* slots;
    void* out;
    int bf16_qkv, bf16_gates, bf16_state, bf16_window, rows, n, window;
    int64_t qkv_stride, gate_stride;
    Sizes z;
    int ratio() const { return z.value_heads / z.key_heads; }
    int tile() const { return z.key_dim * z.value_dim; }
    int64_t head(int task, int r) const {  // among all heads of all slots
        return slots[task / z.key_heads] * z.value_heads + task % z.key_heads * ratio() + r;
    }
};

// g and beta of a token's value head.
inline void gate(const DecodeCall& c, int64_t token, int head, float* g, float* beta) {
    int64_t at = token * c.gate_stride + head;
    *g = read_one(c.a, c.bf16_gates, at), *beta = read_one(c.b, c.bf16_gates, at);
    if (!c.a_log) return;
    float x = *g + c.bias[head];
    *g = -std::exp(c.a_log[head]) * (x > 20 ? x : std::log1p(std::exp(x)));
    *beta = 1 / (1 + std::exp(-*beta));
}

// Fold a window into its state.
template <class S>
void commit(S* state, const Sizes& z, const float* u, const float* log_a, int filled, Room& scratch) {
    int tile = z.key_dim * z.value_dim;
    constexpr bool in_place = std::is_same_v<S, float>;
    float* s = in_place ? (float*)state : scratch.state.data();
    if (!in_place) to_floats(state, s, tile);
    fold(s, z.key_dim, z.value_dim, scratch.window_k.data(), u, log_a, filled, scratch.scaled.data());
    if (!in_place) from_floats(s, state, tile);
}

// The value heads of one key head of one row.
template <class S> void decode_task(const DecodeCall& c, int task, int next_task, Room& scratch) {
    const Sizes& z = c.z;
    int row = task / z.key_heads, kh = task % z.key_heads, n = c.n, dv = z.value_dim;
    int64_t slot = c.slots[row], token = int64_t(row) * n;
    int filled = c.fill[slot], w = filled + n > c.window ? 0 : filled;
    int64_t keys = (slot * z.key_heads + kh) * c.window * z.key_dim;
    read(c.window_k, c.bf16_window, keys, scratch.window_k.data(), filled * z.key_dim);
    read_probes(c.qkv, c.bf16_qkv, token, c.qkv_stride, kh, n, z, scratch.probes.data());
    pair_up(scratch, z.key_dim, n, w, scratch.pairs.data());
    for (int r = 0; r < c.ratio(); r++) {
        int vh = kh * c.ratio() + r;
        int64_t head = c.head(task, r);
        int64_t after = r + 1 < c.ratio() ? head + 1 : c.head(next_task, 0);
        float *u = c.window_u + head * c.window * dv, *log_a = c.window_g + head * c.window;
        S *states = static_cast<S*>(c.state), *s = states + head * c.tile();
        if (w < filled) commit(s, z, u, log_a, filled, scratch);
        for (int t = 0; t < n; t++) {
            gate(c, token + t, vh, log_a + w + t, scratch.beta.data() + t);
            int64_t at = (token + t) * c.qkv_stride + 2 * z.key_heads * z.key_dim + vh * dv;
            read(c.qkv, c.bf16_qkv, at, scratch.v.data() + t * dv, dv);
        }
        advance(s, states + after * c.tile(), c.window_u + after * c.window * dv, z, scratch, n, w, u,
                log_a, scratch.beta.data(), scratch.out.data());
        for (int t = 0; t < n; t++)
            write(c.out, c.bf16_qkv, ((token + t) * z.value_heads + vh) * dv,
                  scratch.out.data() + t * dv, dv);
    }
    write(c.window_k, c.bf16_window, keys + w * z.key_dim, scratch.probes.data(), n * z.key_dim);
}

// --- prompts

struct PrefillCall {
    const void* qkv;
    const float *g, *beta;
    void* state;
    const int64_t* slots;
    const int32_t* offsets;
    void* out;
    int bf16_qkv, bf16_state;
    int64_t qkv_stride, gate_stride;
    Sizes z;
};

// The states of a key head's value heads stay in the L2 cache.
struct PrefillRoom : Room {
    std::vector<float> states, u;
    PrefillRoom(int key_dim, int value_dim, int ratio)
        : Room(key_dim, value_dim, CHUNK, 0), states(ratio * key_dim * value_dim),
          u(CHUNK * value_dim) {}
};

// n tokens of one value head from its state s, which is then the state after them.
void prefill_chunk(const PrefillCall& c, int64_t token, int n, int head, float* s,
                   PrefillRoom& scratch) {
    const Sizes& z = c.z;
    float log_a[CHUNK], *u = scratch.u.data();
    for (int t = 0; t < n; t++) {
        int64_t gates = (token + t) * c.gate_stride + head;
        log_a[t] = c.g[gates], scratch.beta[t] = c.beta[gates];
        int64_t at = (token + t) * c.qkv_stride + 2 * z.key_heads * z.key_dim + head * z.value_dim;
        read(c.qkv, c.bf16_qkv, at, scratch.v.data() + t * z.value_dim, z.value_dim);
    }
    advance(s, s, u, z, scratch, n, 0, u, log_a, scratch.beta.data(), scratch.out.data());
    fold(s, z.key_dim, z.value_dim, scratch.probes.data(), u, log_a, n, scratch.scaled.data());
    for (int t = 0; t < n; t++)
        write(c.out, c.bf16_qkv, ((token + t) * z.value_heads + head) * z.value_dim,
              scratch.out.data() + t * z.value_dim, z.value_dim);
}

// The value heads of one key head of one row.
void prefill_task(const PrefillCall& c, int task) {
    const Sizes& z = c.z;
    int row = task / z.key_heads, kh = task % z.key_heads, ratio = z.value_heads / z.key_heads;
    int tile = z.key_dim * z.value_dim;
    PrefillRoom& scratch = room_of<PrefillRoom>(z.key_dim, z.value_dim, ratio);
    int64_t first = (c.slots[row] * z.value_heads + kh * ratio) * tile;
    read(c.state, c.bf16_state, first, scratch.states.data(), ratio * tile);
    for (int token = c.offsets[row]; token < c.offsets[row + 1]; token += CHUNK) {
        int n = std::min(CHUNK, c.offsets[row + 1] - token);
        read_probes(c.qkv, c.bf16_qkv, token, c.qkv_stride, kh, n, z, scratch.probes.data());
        pair_up(scratch, z.key_dim, n, 0, scratch.pairs.data());
        for (int r = 0; r < ratio; r++)
            prefill_chunk(c, token, n, kh * ratio + r, scratch.states.data() + r * tile, scratch);
    }
    write(c.state, c.bf16_state, first, scratch.states.data(), ratio * tile);
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
    DecodeCall c{qkv, a, b, a_log, bias, state, window_k, window_u, window_g, fill, slots, out,
                 bf16_qkv, bf16_gates, bf16_state, bf16_window, rows, n, window, qkv_stride,
                 gate_stride, {key_heads, value_heads, key_dim, value_dim}};
    int tasks = rows * key_heads;
    share(tasks, threads, [&](int task) {
        Room& scratch = room_of<Room>(key_dim, value_dim, n, window);
        int next = std::min(task + threads, tasks - 1);
        if (bf16_state) decode_task<bf16>(c, task, next, scratch);
        else decode_task<float>(c, task, next, scratch);
    });
}

void millrace_gdn_prefill(const void* qkv, const float* g, const float* beta, void* state,
                          const int64_t* slots, const int32_t* offsets, void* out, int bf16_qkv,
                          int bf16_state, int rows, int64_t qkv_stride, int64_t gate_stride,
                          int key_heads, int value_heads, int key_dim, int value_dim,
                          int threads) {
    PrefillCall c{qkv, g, beta, state, slots, offsets, out, bf16_qkv, bf16_state, qkv_stride,
                  gate_stride, {key_heads, value_heads, key_dim, value_dim}};
    share(rows * key_heads, threads, [&](int task) { prefill_task(c, task); });
}

}  // extern "C"
