// The CPU's fast paths: paged attention, Gated DeltaNet, its convolution, and the norms around them.
//
// Plain C functions over pointers; the Python modules beside this file check shapes and types and
// call them. All arithmetic is float32; activations, caches and states may be bfloat16 and are
// rounded once, when stored. Lengths of heads are multiples of LANES. What the functions compute is
// defined by the references in millrace/kernels; the names here are theirs.

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
constexpr int CHUNK = 16;  // prompt tokens that advance together
constexpr int SMALL = 1 << 15;  // elements below which waking another thread costs more

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
struct bf16 { uint16_t bits; };

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Floats load(const bf16* p) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
    return (Floats)wide;
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

// exp to about 2 ulp, in a form that loops vectorise; 0 where float32 has no normal result.
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
// The sums of four vectors.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
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
        Four four = sums(total[0], total[1], total[2], total[3]);
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

// --- attention ---------------------------------------------------------------------------------

struct Pages {
    const int32_t* table;  // of the row's slot
    int page_size, kv_heads, dim;
};

// What a thread needs for one query: where the visible keys lie, and their weights.
struct Seen {
    std::vector<int64_t> places;
    std::vector<float> weights, query, out;
    // Positions from .. end - 1 of one KV head, as distances from the start of the cache.
    void find(const Pages& pages, int head, int from, int end) {
        int n = std::max(end - from, 0);
        places.resize(n);
        weights.resize(n);
        query.resize(pages.dim);
        out.resize(pages.dim);
        for (int position = from; position < end;) {
            int page = position / pages.page_size, next = (page + 1) * pages.page_size;
            int64_t row = int64_t(pages.table[page]) * pages.page_size + position % pages.page_size;
            for (; position < std::min(next, end); position++, row++)
                places[position - from] = (row * pages.kv_heads + head) * pages.dim;
        }
    }
};

// out = the weighted sum of WIDE vectors of each value.
template <int WIDE, class K>
void add_values(const K* values, const Seen& seen, float* out) {
    Floats total[WIDE] = {};
    for (size_t p = 0; p < seen.places.size(); p++) {
        const K* v = values + seen.places[p];
        Floats weight = seen.weights[p] - (Floats){};
        for (int i = 0; i < WIDE; i++) total[i] += weight * load(v + i * LANES);
    }
    for (int i = 0; i < WIDE; i++) store(out + i * LANES, total[i]);
}

// One query over what it sees.
template <class T, class K>
void attend_one(const T* query, const K* keys, const K* values, int dim, float scale, Seen& seen,
                T* out) {
    int n = int(seen.places.size()), d = 0;
    float *weights = seen.weights.data(), *o = seen.out.data(), most = -INFINITY, total = 0;
    to_floats(query, seen.query.data(), dim);
    dots(seen.query.data(), [&](int p) { return keys + seen.places[p]; }, n, dim, weights);
    for (int p = 0; p < n; p++) most = std::max(most, weights[p] *= scale);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < n; p++) {
        weights[p] = fast_exp(weights[p] - most);
        total += weights[p];
    }
    for (; d + 16 * LANES <= dim; d += 16 * LANES) add_values<16>(values + d, seen, o + d);
    for (; d + 4 * LANES <= dim; d += 4 * LANES) add_values<4>(values + d, seen, o + d);
    for (; d < dim; d += LANES) add_values<1>(values + d, seen, o + d);
    float share = n ? 1 / total : 0;
    for (int i = 0; i < dim; i++) put(out + i, o[i] * share);
}

template <class T, class K>
void attend_all(const T* q, const K* keys, const K* values, const int32_t* table,
                const int64_t* slots, const int64_t* starts, const int32_t* offsets, T* out,
                int rows, int heads, int kv_heads, int dim, int page_size, int max_pages,
                int first, float scale, int threads) {
    std::vector<int> row_of(offsets[rows]);
    for (int r = 0; r < rows; r++)
        std::fill(row_of.begin() + offsets[r], row_of.begin() + offsets[r + 1], r);
    int tasks = offsets[rows] * heads;
#pragma omp parallel num_threads(threads)
    {
        Seen seen;
#pragma omp for schedule(dynamic, 8)
        for (int task = 0; task < tasks; task++) {
            int token = task / heads, head = task % heads, row = row_of[token];
            Pages pages{table + slots[row] * max_pages, page_size, kv_heads, dim};
            int64_t end = starts[row] + token - offsets[row] + 1;
            end = std::min(end, int64_t(max_pages) * page_size);
            seen.find(pages, head / (heads / kv_heads), first, int(end));
            attend_one(q + int64_t(task) * dim, keys, values, dim, scale, seen,
                       out + int64_t(task) * dim);
        }
    }
}

// --- Gated DeltaNet ----------------------------------------------------------------------------

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

void millrace_attend(const void* q, const void* keys, const void* values, const int32_t* table,
                     const int64_t* slots, const int64_t* starts, const int32_t* offsets,
                     void* out, int q_bf16, int kv_bf16, int rows, int heads, int kv_heads,
                     int dim, int page_size, int max_pages, int first, float scale, int threads) {
#define MILLRACE_ATTEND(T, K)                                                                  \
    attend_all((const T*)q, (const K*)keys, (const K*)values, table, slots, starts, offsets,   \
               (T*)out, rows, heads, kv_heads, dim, page_size, max_pages, first, scale, threads)
    if (q_bf16 && kv_bf16) MILLRACE_ATTEND(bf16, bf16);
    else if (q_bf16) MILLRACE_ATTEND(bf16, float);
    else if (kv_bf16) MILLRACE_ATTEND(float, bf16);
    else MILLRACE_ATTEND(float, float);
#undef MILLRACE_ATTEND
}

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

// --- convolution -------------------------------------------------------------------------------

namespace {

constexpr int BLOCK = 256;  // channels that run together

// Channels c .. c + n of one row of `count` tokens; `keep` inputs from the last ones stay behind.
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
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (int64_t(offsets[rows]) * channels > SMALL)
    for (int task = 0; task < rows * blocks; task++) {
        int row = task / blocks, c = task % blocks * BLOCK;
        convolve(x + offsets[row] * stride, stride, conv + slots[row] * depth * channels, channels,
                 taps.data(), depth == 3 ? 0 : conv_offset[slots[row]],
                 offsets[row + 1] - offsets[row], keep, c, std::min(BLOCK, channels - c),
                 out + int64_t(offsets[row]) * channels);
    }
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

// --- norms -------------------------------------------------------------------------------------

namespace {

template <class T>
void norm_row(const T* x, const T* residual, const float* weight, float eps, int n, T* total,
              T* out) {
    if (residual)
        for (int i = 0; i < n; i++) put(total + i, get(x[i]) + get(residual[i]));
    const T* in = residual ? total : x;
    float scale = 1 / std::sqrt(sum_of_squares(in, n) / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++) put(out + i, get(in[i]) * scale * (1 + weight[i]));
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

// Norm, then rotary embedding, of one head; room: dim floats.
template <class T>
void norm_rope(const T* x, const float* weight, float eps, const float* cos_sin, int rotary,
               int dim, float* room, T* out) {
    float scale = 1 / std::sqrt(sum_of_squares(x, dim) / dim + eps);
    for (int i = 0; i < dim; i++) put(out + i, get(x[i]) * scale * (1 + weight[i]));
    to_floats(out, room, rotary);
    int half = rotary / 2;
    const float *cos = cos_sin, *sin = cos_sin + half;
    for (int i = 0; i < half; i++) {
        put(out + i, room[i] * cos[i] - room[half + i] * sin[i]);
        put(out + half + i, room[half + i] * cos[i] + room[i] * sin[i]);
    }
}
template <class T, class K>
void norm_rope_store_all(const T* qkv, int64_t stride, const float* qw, const float* kw, float eps,
                         const int64_t* positions, const float* cos_sin, int rotary, K* keys,
                         K* values, const int64_t* kv_rows, T* q, int tokens, int heads,
                         int kv_heads, int dim, int threads) {
#pragma omp parallel num_threads(threads) if (int64_t(tokens) * heads * dim > SMALL)
    {
        std::vector<float> room(dim);
        std::vector<T> key(dim);
#pragma omp for schedule(static)
        for (int t = 0; t < tokens; t++) {
            const T *in = qkv + t * stride, *k = in + 2 * heads * dim, *v = k + kv_heads * dim;
            const float* angles = cos_sin + positions[t] * rotary;
            for (int h = 0; h < heads; h++)
                norm_rope(in + h * dim, qw, eps, angles, rotary, dim, room.data(),
                          q + (int64_t(t) * heads + h) * dim);
            for (int h = 0; h < kv_heads; h++) {
                int64_t at = (kv_rows[t] * kv_heads + h) * dim;
                norm_rope(k + h * dim, kw, eps, angles, rotary, dim, room.data(), key.data());
                for (int i = 0; i < dim; i++) put(keys + at + i, get(key[i]));
                for (int i = 0; i < dim; i++) put(values + at + i, get(v[h * dim + i]));
            }
        }
    }
}

}  // namespace

extern "C" {

#define MILLRACE_ROWS(call_bf16, call_float)                                                 \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (rows * int64_t(n) > SMALL)") \
    for (int64_t r = 0; r < rows; r++) {                                                     \
        if (is_bf16) { typedef bf16 T; call_bf16; }                                          \
        else { typedef float T; call_float; }                                                \
    }
#define MILLRACE_EACH(call) MILLRACE_ROWS(call, call)

void millrace_rms_norm(const void* x, const void* residual, const float* weight, float eps,
                       int64_t rows, int n, int64_t stride, void* total, void* out, int is_bf16,
                       int threads) {
    MILLRACE_EACH(norm_row((const T*)x + r * stride, residual ? (const T*)residual + r * n : nullptr,
                           weight, eps, n, (T*)total + r * n, (T*)out + r * n))
}
// z: rows of `heads` heads, a token's heads together.
void millrace_gated_rms_norm(const void* o, const void* z, int64_t z_stride, const float* weight,
                             float eps, int64_t rows, int heads, int n, void* out, int is_bf16,
                             int threads) {
    MILLRACE_EACH(gated_row((const T*)o + r * n,
                            (const T*)z + r / heads * z_stride + r % heads * n, weight, eps, n,
                            (T*)out + r * n))
}
void millrace_silu_mul(const void* gate_up, int64_t rows, int n, void* out, int is_bf16,
                       int threads) {
    MILLRACE_EACH(silu_row((const T*)gate_up + r * 2 * n, n, (T*)out + r * n))
}
void millrace_sigmoid_gate(const void* x, const void* gate, int64_t gate_stride, int64_t rows,
                           int n, void* out, int is_bf16, int threads) {
    MILLRACE_EACH(sigmoid_row((const T*)x + r * n, (const T*)gate + r * gate_stride, n,
                              (T*)out + r * n))
}

void millrace_norm_rope_store(const void* qkv, int64_t stride, const float* qw, const float* kw,
                              float eps, const int64_t* positions, const float* cos_sin,
                              int rotary, void* keys, void* values, const int64_t* kv_rows,
                              void* q, int is_bf16, int kv_bf16, int tokens, int heads,
                              int kv_heads, int dim, int threads) {
#define MILLRACE_STORE(T, K)                                                                   \
    norm_rope_store_all((const T*)qkv, stride, qw, kw, eps, positions, cos_sin, rotary,        \
                        (K*)keys, (K*)values, kv_rows, (T*)q, tokens, heads, kv_heads, dim,    \
                        threads)
    if (is_bf16 && kv_bf16) MILLRACE_STORE(bf16, bf16);
    else if (is_bf16) MILLRACE_STORE(bf16, float);
    else if (kv_bf16) MILLRACE_STORE(float, bf16);
    else MILLRACE_STORE(float, float);
#undef MILLRACE_STORE
}

}  // extern "C"

// --- products ----------------------------------------------------------------------------------

#ifdef __AVX512BF16__
namespace {

// out[R, 4] = x[R, n] w[4, n]^T; n: a multiple of 32.
template <int R>
void product_tile(const bf16* x, const bf16* w, int n, bf16* out, int64_t out_stride) {
    __m512 total[R][4] = {};
    auto read_pairs = [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
    for (int j = 0; j < n; j += 32) {
        __m512bh column[4];
        for (int c = 0; c < 4; c++) column[c] = read_pairs(w + c * n + j);
        for (int r = 0; r < R; r++) {
            __m512bh row = read_pairs(x + r * n + j);
            for (int c = 0; c < 4; c++) total[r][c] = _mm512_dpbf16_ps(total[r][c], row, column[c]);
        }
    }
    for (int r = 0; r < R; r++) {
        Four four = sums((Floats)total[r][0], (Floats)total[r][1], (Floats)total[r][2],
                         (Floats)total[r][3]);
        __m128i rounded = (__m128i)_mm_cvtneps_pbh((__m128)four);
        _mm_storel_epi64((__m128i*)(out + r * out_stride), rounded);
    }
}

}  // namespace
#endif

// out[rows, columns] = x[rows, n] w[columns, n]^T in bfloat16. Returns 0 if this processor cannot.
extern "C" int millrace_linear(const void* x, const void* weight, int rows, int columns, int n,
                               void* out, int threads) {
#ifdef __AVX512BF16__
    // A block of columns stays in the first cache, and its outputs are written a whole line each.
    constexpr int LINE = 32;
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (int64_t(rows) * columns * n > 64 * SMALL)
    for (int block = 0; block < columns; block += LINE) {
        int end = std::min(columns, block + LINE);
        for (int r = 0; r < rows;) {
            const bf16 *in = (const bf16*)x + int64_t(r) * n, *w = (const bf16*)weight;
            bf16* to = (bf16*)out + int64_t(r) * columns;
            int step = r + 4 <= rows ? 4 : 1;
            for (int c = block; c < end; c += 4)
                (step == 4 ? product_tile<4> : product_tile<1>)(in, w + int64_t(c) * n, n, to + c,
                                                                columns);
            r += step;
        }
    }
    return 1;
#else
    return 0;
#endif
}
