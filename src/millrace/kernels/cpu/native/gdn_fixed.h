// Gated DeltaNet in windows that begin at fixed positions; the equations are in
// millrace/kernels/gdn.py.
//
// A slot's window begins at a multiple of its rows. A token is computed from the state there and the
// window's rows before it, one after another. So it gets the same bits as part of a prompt, of a row
// that verifies drafts, or alone. A window that is full is folded before the next token.
#pragma once

#include "gdn.h"

namespace {

// prompts: rows may be longer than what is left of their windows. offsets: where rows begin, and the
// end of the last one.
struct FixedCall : DecodeCall {
    const int32_t* offsets;
    int prompts;
};

// pairs[2n, window]: n keys, then n queries, with the window's keys, each up to its own token, which
// is row `from` or one behind it. Groups of four rows are the same for every token.
void pair_fixed(const float* probes, const float* keys, int key_dim, int n, int from, int window,
                float* pairs) {
    for (int m = 0; m < 2 * n; m++)
        dots(probes + m * key_dim, [&](int i) { return keys + i * key_dim; },
             (from + m % n + LANES / 4) / 4 * 4, key_dim, pairs + m * window);
}

// Columns of one token: u and the output. before: rows of the window before it; old: what the
// state gives for its key and query; by_key, by_query: the weights of the rows before it, and its own.
template <int WIDE>
void answer_columns(const float* old_key, const float* old_query, float share, const float* by_key,
                    const float* by_query, int before, const float* u, int columns, const float* v,
                    float beta, float* mine, float* out) {
    Floats key[WIDE], query[WIDE];
    for (int i = 0; i < WIDE; i++) {
        key[i] = share * load(old_key + i * LANES);
        query[i] = share * load(old_query + i * LANES);
    }
    for (int t = 0; t < before; t++) {
        Floats k = by_key[t] - (Floats){}, q = by_query[t] - (Floats){};
        for (int i = 0; i < WIDE; i++) {
            Floats row = load(u + t * columns + i * LANES);
            key[i] += k * row;
            query[i] += q * row;
        }
    }
    Floats own = by_query[before] - (Floats){};
    for (int i = 0; i < WIDE; i++) {
        Floats fresh = beta * (load(v + i * LANES) - key[i]);
        store(mine + i * LANES, fresh);
        store(out + i * LANES, query[i] + own * fresh);
    }
}

// u and outputs of n tokens of one value head behind `filled` rows of its window. log_a: of the
// window, with g in the new rows on entry.
template <class S>
void advance_fixed(const FixedCall& c, const S* state, const S* next, Room& scratch, int n,
                   int filled, float* u, float* log_a) {
    const int dv = c.z.value_dim, w = c.window;
    float *weights = scratch.weights.data(), *old = scratch.old.data();
    for (int t = filled; t < filled + n; t++) log_a[t] += t ? log_a[t - 1] : 0.0f;
    for (int m = 0; m < 2 * n; m++) {
        const float now = log_a[filled + m % n], *pairs = scratch.pairs.data() + m * w;
#pragma omp simd
        for (int i = 0; i < w; i++)
            weights[m * w + i] = pairs[i] * fast_exp(std::min(now - log_a[i], 0.0f));
    }
    probe(state, next, c.z.key_dim, dv, scratch.probes.data(), 2 * n, old);
    for (int t = 0; t < n; t++) {
        float share = fast_exp(log_a[filled + t]);
        const float *key = weights + t * w, *query = weights + (n + t) * w;
        auto columns = [&](auto wide, int d) {
            answer_columns<decltype(wide)::value>(
                old + t * dv + d, old + (n + t) * dv + d, share, key, query, filled + t, u + d, dv,
                scratch.v.data() + t * dv + d, scratch.beta[t], u + (filled + t) * dv + d,
                scratch.out.data() + t * dv + d);
        };
        int d = 0;
        for (; d + 8 * LANES <= dv; d += 8 * LANES) columns(std::integral_constant<int, 8>(), d);
        for (; d < dv; d += LANES) columns(std::integral_constant<int, 1>(), d);
    }
}

// The value heads of one key head, for n tokens behind `filled` rows of the slot's window.
template <class S>
void fixed_tokens(const FixedCall& c, int task, int next_task, int64_t token, int n, int filled,
                  float* keys, Room& scratch) {
    const Sizes& z = c.z;
    int kh = task % z.key_heads, dv = z.value_dim;
    S* states = static_cast<S*>(c.state);
    read_probes(c.qkv, c.bf16_qkv, token, c.qkv_stride, kh, n, z, scratch.probes.data());
    std::memcpy(keys + filled * z.key_dim, scratch.probes.data(), n * z.key_dim * sizeof(float));
    pair_fixed(scratch.probes.data(), keys, z.key_dim, n, filled, c.window, scratch.pairs.data());
    for (int r = 0; r < c.ratio(); r++) {
        int vh = kh * c.ratio() + r;
        int64_t head = c.head(task, r), after = r + 1 < c.ratio() ? head + 1 : c.head(next_task, 0);
        float *u = c.window_u + head * c.window * dv, *log_a = c.window_g + head * c.window;
        for (int t = 0; t < n; t++) {
            gate(c, token + t, vh, log_a + filled + t, scratch.beta.data() + t);
            int64_t at = (token + t) * c.qkv_stride + 2 * z.key_heads * z.key_dim + vh * dv;
            read(c.qkv, c.bf16_qkv, at, scratch.v.data() + t * dv, dv);
        }
        advance_fixed(c, states + head * c.tile(), states + after * c.tile(), scratch, n, filled, u, log_a);
        for (int t = 0; t < n; t++)
            write(c.out, c.bf16_qkv, ((token + t) * z.value_heads + vh) * dv,
                  scratch.out.data() + t * dv, dv);
    }
}

// Fold the full windows of one key head's value heads into their states.
template <class S> void fold_full(const FixedCall& c, int task, const float* keys, Room& scratch) {
    for (int r = 0; r < c.ratio(); r++) {
        int64_t head = c.head(task, r);
        S* state = static_cast<S*>(c.state) + head * c.tile();
        constexpr bool in_place = std::is_same_v<S, float>;
        float* s = in_place ? (float*)state : scratch.state.data();
        if (!in_place) to_floats(state, s, c.tile());
        fold(s, c.z.key_dim, c.z.value_dim, keys, c.window_u + head * c.window * c.z.value_dim,
             c.window_g + head * c.window, c.window, scratch.scaled.data());
        if (!in_place) from_floats(s, state, c.tile());
    }
}

// A key head of one row. Tokens of a row of drafts that are behind its window get zeros.
template <class S> void fixed_task(const FixedCall& c, int task, int next_task, Room& scratch) {
    const Sizes& z = c.z;
    int row = task / z.key_heads, kh = task % z.key_heads;
    int64_t slot = c.slots[row];
    int filled = c.fill[slot], token = c.offsets[row], end = c.offsets[row + 1];
    float* keys = static_cast<float*>(c.window_k) + (slot * z.key_heads + kh) * c.window * z.key_dim;
    for (bool first = true; token < end && (first || c.prompts); first = false) {
        if (filled == c.window) {
            fold_full<S>(c, task, keys, scratch);
            filled = 0;
        }
        int n = std::min(c.window - filled, end - token);
        fixed_tokens<S>(c, task, next_task, token, n, filled, keys, scratch);
        token += n, filled += n;
    }
    std::fill(scratch.out.begin(), scratch.out.end(), 0.0f);
    for (; token < end; token++)
        for (int r = 0; r < c.ratio(); r++)
            write(c.out, c.bf16_qkv, (int64_t(token) * z.value_heads + kh * c.ratio() + r) * z.value_dim,
                  scratch.out.data(), z.value_dim);
}

}  // namespace

// window: rows of a slot's window, a multiple of 16; keys in it are float32. fill: rows in it.
extern "C" void millrace_gdn_fixed(const void* qkv, const void* a, const void* b, const float* a_log,
                                   const float* bias, void* state, float* window_k, float* window_u,
                                   float* window_g, const int32_t* fill, const int64_t* slots,
                                   const int32_t* offsets, void* out, int bf16_qkv, int bf16_gates,
                                   int bf16_state, int rows, int window, int prompts,
                                   int64_t qkv_stride, int64_t gate_stride, int key_heads,
                                   int value_heads, int key_dim, int value_dim, int threads) {
    FixedCall c{{qkv, a, b, a_log, bias, state, window_k, window_u, window_g, fill, slots, out,
                 bf16_qkv, bf16_gates, bf16_state, 0, rows, 0, window, qkv_stride, gate_stride,
                 {key_heads, value_heads, key_dim, value_dim}}, offsets, prompts};
    int tasks = rows * key_heads;
    share(tasks, threads, [&](int task) {
        Room& scratch = room_of<Room>(key_dim, value_dim, window, window);
        int next = std::min(task + threads, tasks - 1);
        if (bf16_state) fixed_task<bf16>(c, task, next, scratch);
        else fixed_task<float>(c, task, next, scratch);
    });
}
