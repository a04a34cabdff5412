// Attention over pages: keys and values are read in place.
//
// A task is a block of queries that share a KV head in one row: several tokens, and all query heads
// of the group. Few queries use dot products; many use GEMMs on packed panels, in blocks of
// positions, with a running softmax. Rows that no query of a block may see are never read.
#pragma once

#include "gemm.h"

namespace {

constexpr int FEW = 4;  // queries below which packing keys costs more than it saves
constexpr int QUERIES = 48;  // the most of a task
constexpr int SPAN = 64;  // positions that they meet at once

struct Attention {
    const void *q, *keys, *values;
    const int32_t* table;
    const int64_t *slots, *starts;
    const int32_t* offsets;
    void* out;
    int rows, heads, kv_heads, dim, page_size, max_pages, first;
    float scale;
    int fixed;  // every query in blocks of positions, so that it does not depend on how many there are
    int group() const { return heads / kv_heads; }
    int tokens_a_task() const { return std::max(1, QUERIES / group()); }
};

struct Task {
    int row, kv_head, token, count;  // tokens token .. token + count - 1 of the step
};

std::vector<Task> tasks_of(const Attention& a) {
    std::vector<Task> tasks;
    for (int row = 0; row < a.rows; row++)
        for (int token = a.offsets[row]; token < a.offsets[row + 1]; token += a.tokens_a_task())
            for (int head = 0; head < a.kv_heads; head++)
                tasks.push_back({row, head, token,
                                 std::min(a.tokens_a_task(), a.offsets[row + 1] - token)});
    return tasks;
}

// What the queries of a task may see. places: distances of positions from the start of the cache.
template <class T> struct View {
    const Attention& a;
    Task task;
    std::vector<int64_t>& places;
    int queries;

    View(const Attention& a, const Task& task, std::vector<int64_t>& places)
        : a(a), task(task), places(places), queries(task.count * a.group()) {
        int end = visible(queries - 1);
        places.resize(end);
        const int32_t* pages = a.table + a.slots[task.row] * a.max_pages;
        for (int i = 0; i < end;) {
            int position = a.first + i, inside = position % a.page_size;
            int64_t row = int64_t(pages[position / a.page_size]) * a.page_size + inside;
            for (; i < end && inside < a.page_size; i++, inside++, row++)
                places[i] = (row * a.kv_heads + task.kv_head) * a.dim;
        }
    }
    // How many positions, from `first` on, query i sees.
    int visible(int i) const {
        int64_t token = task.token + i / a.group();
        int64_t end = a.starts[task.row] + token - a.offsets[task.row] + 1;
        return int(std::max<int64_t>(std::min(end, int64_t(a.max_pages) * a.page_size) - a.first, 0));
    }
    int64_t at(int i) const {
        int64_t token = task.token + i / a.group();
        return (token * a.heads + task.kv_head * a.group() + i % a.group()) * a.dim;
    }
    const T* query(int i) const { return (const T*)a.q + at(i); }
    T* out(int i) const { return (T*)a.out + at(i); }
};

// --- few queries

// total += 32 channels of q times k; bfloat16 pairs in one instruction, if the processor has it.
template <class T, class K> inline Floats dot_step(const T* q, const K* k, Floats total) {
    return total + load(q) * load(k) + load(q + LANES) * load(k + LANES);
}
#ifdef __AVX512BF16__
inline Floats dot_step(const bf16* q, const bf16* k, Floats total) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(q),
                                    (__m512bh)_mm512_loadu_si512(k));
}
#endif
template <class T, class K> inline Floats multiply(const T* q, const K* k, int dim) {
    Floats total = {};
    int d = 0;
    for (; d + PANEL <= dim; d += PANEL) total = dot_step(q + d, k + d, total);
    if (d < dim) total += load(q + d) * load(k + d);
    return total;
}

template <class K> inline void fetch(const K* vector, int dim) {
    for (int d = 0; d < dim; d += 64 / int(sizeof(K))) __builtin_prefetch(vector + d);
}
constexpr int AHEAD = 6;  // positions

// scores[G][n] of G queries with every position.
template <int G, class T, class K>
void score_few(const View<T>& view, const T* const* q, float* scores) {
    const K* keys = (const K*)view.a.keys;
    int n = int(view.places.size()), dim = view.a.dim, p = 0;
    for (; p + 4 <= n; p += 4) {
        Floats total[G][4];
        for (int i = 0; i < 4; i++) {
            if (p + i + AHEAD < n) fetch(keys + view.places[p + i + AHEAD], dim);
            for (int g = 0; g < G; g++)
                total[g][i] = multiply(q[g], keys + view.places[p + i], dim);
        }
        for (int g = 0; g < G; g++) {
            Four four = horizontal_sums(total[g][0], total[g][1], total[g][2], total[g][3]);
            std::memcpy(scores + g * n + p, &four, sizeof four);
        }
    }
    for (; p < n; p++)
        for (int g = 0; g < G; g++)
            scores[g * n + p] = sum(multiply(q[g], keys + view.places[p], dim));
}

// out[G][..] += WIDE vectors of each value from channel d on, weighted.
template <int G, int WIDE, class T, class K>
void add_values(const View<T>& view, const float* weights, int d, float* out) {
    const K* values = (const K*)view.a.values + d;
    int n = int(view.places.size());
    Floats total[G][WIDE] = {};
    for (int p = 0; p < n; p++) {
        const K* v = values + view.places[p];
        if (p + AHEAD < n) fetch(values + view.places[p + AHEAD], WIDE * LANES);
        for (int i = 0; i < WIDE; i++) {
            Floats value = load(v + i * LANES);
            for (int g = 0; g < G; g++) total[g][i] += (weights[g * n + p] - (Floats){}) * value;
        }
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < WIDE; i++) store(out + g * view.a.dim + d + i * LANES, total[g][i]);
}

// Softmax weights[visible] of scores, in place, without the division; returns the divisor. The rest
// up to n become 0.
inline float soften(float* scores, int visible, int n, float scale) {
    float most = -INFINITY, total = 0;
    for (int p = 0; p < visible; p++) most = std::max(most, scores[p] *= scale);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < visible; p++) {
        scores[p] = fast_exp(scores[p] - most);
        total += scores[p];
    }
    for (int p = visible; p < n; p++) scores[p] = 0;
    return total;
}

template <int G, class T, class K>
void attend_few(const View<T>& view, std::vector<float>& scratch) {
    int n = int(view.places.size()), dim = view.a.dim, d = 0;
    scratch.resize(G * (n + dim));
    float *weights = scratch.data(), *out = weights + G * n, share[G];
    const T* q[G];
    for (int g = 0; g < G; g++) q[g] = view.query(g);
    score_few<G, T, K>(view, q, weights);
    for (int g = 0; g < G; g++) {
        float total = soften(weights + g * n, view.visible(g), n, view.a.scale);
        share[g] = total > 0 ? 1 / total : 0;
    }
    for (; d + 8 * LANES <= dim; d += 8 * LANES) add_values<G, 8, T, K>(view, weights, d, out);
    for (; d < dim; d += LANES) add_values<G, 1, T, K>(view, weights, d, out);
    for (int g = 0; g < G; g++)
        for (int i = 0; i < dim; i++) put(view.out(g) + i, out[g * dim + i] * share[g]);
}

// --- many queries

// A thread's scratch memory for a block of queries. Channels are padded to full panels.
template <class U> struct Block {
    typedef typename U::Element Element;
    int dim, padded;
    std::vector<Element> queries, weights;
    std::vector<Words> keys, values;
    std::vector<float> scores, out, most, total, rescale, copy;
    explicit Block(int dim)
        : dim(dim), padded((dim + PANEL - 1) / PANEL * PANEL), queries(QUERIES * dim),
          weights(QUERIES * SPAN), keys(SPAN * dim / U::STEP / LANES),
          values(SPAN * padded / U::STEP / LANES), scores(QUERIES * SPAN),
          out(QUERIES * padded), most(QUERIES), total(QUERIES), rescale(QUERIES),
          copy(PANEL * dim) {}
    Words (*key_panel(int i))[2] { return (Words(*)[2])keys.data() + i * (dim / U::STEP); }
    Words (*value_panel(int i))[2] { return (Words(*)[2])values.data() + i * (SPAN / U::STEP); }
};

template <class U> inline void pack_keys(Block<U>& b, const typename U::Element* keys,
                                         const int64_t* places, int count) {
    for (int p = 0; p < count; p += PANEL)
        pack([&](int i) { return keys + places[p + i]; }, std::min(PANEL, count - p),
             b.dim / U::STEP, 0, b.key_panel(p / PANEL));
}
// Keys of another dtype are copied first.
template <class K>
void pack_copies(Block<FloatWords>& b, const K* keys, const int64_t* places, int count) {
    for (int p = 0; p < count; p += PANEL) {
        int n = std::min(PANEL, count - p);
        for (int i = 0; i < n; i++)
            for (int d = 0; d < b.dim; d += LANES)
                store(b.copy.data() + i * b.dim + d, load(keys + places[p + i] + d));
        pack([&](int i) { return b.copy.data() + i * b.dim; }, n, b.dim, 0, b.key_panel(p / PANEL));
    }
}

inline void pack_keys(Block<FloatWords>& b, const bf16* keys, const int64_t* places, int count) {
    pack_copies(b, keys, places, count);
}
inline void pack_keys(Block<FloatWords>& b, const e4m3* keys, const int64_t* places, int count) {
    pack_copies(b, keys, places, count);
}

// Values are packed by channels: a word holds a channel of STEP positions.
template <class K> inline Words value_word(FloatWords, const K* v, const int64_t* places, int, int p) {
    return (Words)load(v + places[p]);
}
#ifdef __AVX512BF16__
inline Words value_word(Bf16Pairs, const bf16* v, const int64_t* places, int count, int p) {
    auto widen = [&](int at) {
        return __builtin_convertvector(*reinterpret_cast<const Halves*>(v + places[at]), Words);
    };
    return p + 1 < count ? widen(p) | widen(p + 1) << 16 : widen(p);
}
#endif
template <class U, class K>
void pack_values(Block<U>& b, const K* values, const int64_t* places, int count) {
    for (int p = 0; p < SPAN; p += U::STEP)
        for (int d = 0; d < b.padded; d += LANES)
            b.value_panel(d / PANEL)[p / U::STEP][d / LANES % 2] =
                p < count && d < b.dim ? value_word(U(), values + d, places, count, p) : Words{};
}

// Turns the queries' scores with the packed positions into weights, and gives the factor by which the
// sums so far must be rescaled: the greatest score has risen.
template <class U> void weigh(Block<U>& b, int q, int visible) {
    float *scores = b.scores.data() + q * SPAN, most = b.most[q], total = 0;
    for (int p = 0; p < visible; p++) most = std::max(most, scores[p]);
    b.rescale[q] = visible && b.total[q] > 0 ? fast_exp(b.most[q] - most) : 1.0f;
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < visible; p++) {
        scores[p] = fast_exp(scores[p] - most);
        total += scores[p];
    }
    for (int p = visible; p < SPAN; p++) scores[p] = 0;
    from_floats(scores, b.weights.data() + q * SPAN, SPAN);
    b.most[q] = most;
    b.total[q] = b.total[q] * b.rescale[q] + total;
}

template <class U> void score_block(Block<U>& b, int queries, int count, float scale) {
    in_runs(queries, [&](auto run, int first) {
        constexpr int R = decltype(run)::value;
        for (int p = 0; p < count; p += PANEL) {
            Floats total[R][2] = {};
            meet<U, R>(b.queries.data() + first * b.dim, b.dim, b.key_panel(p / PANEL), b.dim,
                       total);
            for (int r = 0; r < R; r++)
                for (int half = 0; half < 2; half++)
                    store(b.scores.data() + (first + r) * SPAN + p + half * LANES,
                          total[r][half] * (scale - (Floats){}));
        }
    });
}

template <class U> void add_block(Block<U>& b, int queries, int count) {
    int words = (count + U::STEP - 1) / U::STEP * U::STEP;
    in_runs(queries, [&](auto run, int first) {
        constexpr int R = decltype(run)::value;
        for (int d = 0; d < b.padded; d += PANEL) {
            Floats total[R][2];
            for (int r = 0; r < R; r++)
                for (int half = 0; half < 2; half++)
                    total[r][half] = (b.rescale[first + r] - (Floats){}) *
                                     load(b.out.data() + (first + r) * b.padded + d + half * LANES);
            meet<U, R>(b.weights.data() + first * SPAN, SPAN, b.value_panel(d / PANEL), words,
                       total);
            for (int r = 0; r < R; r++)
                for (int half = 0; half < 2; half++)
                    store(b.out.data() + (first + r) * b.padded + d + half * LANES, total[r][half]);
        }
    });
}

inline void take(const float* x, float* out, int n) { std::memcpy(out, x, n * sizeof *x); }
inline void take(const bf16* x, bf16* out, int n) { std::memcpy(out, x, n * sizeof *x); }
inline void take(const bf16* x, float* out, int n) { to_floats(x, out, n); }

template <class U, class T, class K> void attend_many(const View<T>& view, Block<U>& b) {
    int end = int(view.places.size()), n = view.queries;
    for (int q = 0; q < n; q++) take(view.query(q), b.queries.data() + q * b.dim, b.dim);
    std::fill(b.out.begin(), b.out.begin() + n * b.padded, 0.0f);
    std::fill(b.most.begin(), b.most.end(), -INFINITY);
    std::fill(b.total.begin(), b.total.end(), 0.0f);
    for (int from = 0; from < end; from += SPAN) {
        int count = std::min(SPAN, end - from);
        const int64_t* places = view.places.data() + from;
        pack_keys(b, (const K*)view.a.keys, places, count);
        pack_values(b, (const K*)view.a.values, places, count);
        score_block(b, n, count, view.a.scale);
        for (int q = 0; q < n; q++)
            weigh(b, q, std::min(std::max(view.visible(q) - from, 0), count));
        add_block(b, n, count);
    }
    for (int q = 0; q < n; q++) {
        float share = b.total[q] > 0 ? 1 / b.total[q] : 0;
        for (int i = 0; i < b.dim; i++) put(view.out(q) + i, b.out[q * b.padded + i] * share);
    }
}

template <class U, class T, class K> void attend_all(const Attention& a, int threads) {
    std::vector<Task> tasks = tasks_of(a);
    share(int(tasks.size()), threads, [&](int i) {
        static thread_local std::vector<int64_t> places;
        static thread_local std::vector<float> scratch;
        View<T> view(a, tasks[i], places);
        if (a.fixed || view.queries >= FEW) attend_many<U, T, K>(view, room_of<Block<U>>(a.dim));
        else if (view.queries == 3) attend_few<3, T, K>(view, scratch);
        else if (view.queries == 2) attend_few<2, T, K>(view, scratch);
        else attend_few<1, T, K>(view, scratch);
    });
}

}  // namespace

// kv_kind: 0 float32, 1 bfloat16, 2 e4m3 with scale 1.
extern "C" void millrace_attend(const void* q, const void* keys, const void* values,
                                const int32_t* table, const int64_t* slots, const int64_t* starts,
                                const int32_t* offsets, void* out, int q_bf16, int kv_kind,
                                int rows, int heads, int kv_heads, int dim, int page_size,
                                int max_pages, int first, float scale, int fixed, int threads) {
    Attention a{q,     keys,     values, table,     slots,     starts, offsets, out, rows,
                heads, kv_heads, dim,    page_size, max_pages, first,  scale,  fixed};
#ifdef __AVX512BF16__
    if (q_bf16 && kv_kind == 1 && dim % PANEL == 0) return attend_all<Bf16Pairs, bf16, bf16>(a, threads);
#endif
    if (q_bf16 && kv_kind == 2) attend_all<FloatWords, bf16, e4m3>(a, threads);
    else if (q_bf16 && kv_kind) attend_all<FloatWords, bf16, bf16>(a, threads);
    else if (q_bf16) attend_all<FloatWords, bf16, float>(a, threads);
    else if (kv_kind == 2) attend_all<FloatWords, float, e4m3>(a, threads);
    else if (kv_kind) attend_all<FloatWords, float, bf16>(a, threads);
    else attend_all<FloatWords, float, float>(a, threads);
}
