// Mixture of experts: the MLPs of the experts that have tokens, on panels as in gemm.h.
//
// The rows of x lie expert by expert. A panel of weights is packed once and meets all rows of its
// expert; weights of other experts are not read. A row's result does not depend on other rows.
#pragma once

#include "gemm.h"

namespace {

template <class T> struct Experts {
    const T* x;              // [pairs, hidden]: a row for each token and expert of it
    const int64_t* experts;  // [hits]: those that have rows, ascending
    const int64_t* starts;   // [hits + 1]: where their rows begin
    const int64_t* tokens;   // [pairs]
    const float* weights;    // [pairs]
    const T* gate_up;        // [experts, 2 width, hidden], gate first
    const T* down;           // [experts, hidden, width]
    T* inner;                // [pairs, width]: scratch
    float* out;              // [tokens, hidden]: zeros at first
    int hits, hidden, width;
};

// body(row, totals[2]): the products of rows [first, last) of x [rows, n] with the `count` weights
// from w [count, n] on.
template <class U, class Body>
void meet_panel(const typename U::Element* x, int64_t first, int64_t last,
                const typename U::Element* w, int count, int64_t ahead, int n, Body body) {
    int words = n / U::STEP;
    static thread_local std::vector<Words> scratch;
    scratch.resize(std::max(scratch.size(), size_t(2 * words)));
    auto panel = (Words(*)[2])scratch.data();
    pack([&](int i) { return w + int64_t(i) * n; }, count, words, ahead, panel);
    in_runs(int(last - first), [&](auto run, int r) {
        constexpr int R = decltype(run)::value;
        Floats total[R][2] = {};
        meet<U, R>(x + (first + r) * n, n, panel, n, total);
        for (int i = 0; i < R; i++) body(first + r + i, total[i]);
    });
}

// inner = silu(gate(x)) * up(x), for columns [c, c + count) of one expert.
template <class U>
void gate_and_up(const Experts<typename U::Element>& e, int hit, int c, int count) {
    typedef typename U::Element T;
    int64_t first = e.starts[hit], last = e.starts[hit + 1];
    const T* gate = e.gate_up + (e.experts[hit] * 2 * e.width + c) * e.hidden;
    const T* up = gate + int64_t(e.width) * e.hidden;
    int64_t to_up = (up - gate) * int64_t(sizeof(T));
    static thread_local std::vector<Floats> gates;
    gates.resize(std::max(gates.size(), size_t(2 * (last - first))));
    meet_panel<U>(e.x, first, last, gate, count, to_up, e.hidden, [&](int64_t row, Floats* total) {
        gates[2 * (row - first)] = total[0];
        gates[2 * (row - first) + 1] = total[1];
    });
    meet_panel<U>(e.x, first, last, up, count, 0, e.hidden, [&](int64_t row, Floats* total) {
        T* to = e.inner + row * e.width + c;
        for (int i = 0; i < count; i++) {
            float gate_value = gates[2 * (row - first) + i / LANES][i % LANES];
            put(to + i, silu(gate_value) * total[i / LANES][i % LANES]);
        }
    });
}

// out += weight * down(inner), for columns [c, c + count), expert by expert.
template <class U> void weighted_down(const Experts<typename U::Element>& e, int c, int count) {
    for (int hit = 0; hit < e.hits; hit++) {
        auto down = e.down + (e.experts[hit] * e.hidden + c) * e.width;
        int64_t first = e.starts[hit], last = e.starts[hit + 1];
        meet_panel<U>(e.inner, first, last, down, count, 0, e.width, [&](int64_t row, Floats* total) {
            float* to = e.out + e.tokens[row] * e.hidden + c;
            for (int i = 0; i < count; i++)
                to[i] += e.weights[row] * total[i / LANES][i % LANES];
        });
    }
}

template <class U> void run_experts(const Experts<typename U::Element>& e, int threads) {
    int panels = (e.width + PANEL - 1) / PANEL;
    share(e.hits * panels, threads, [&](int task) {
        int c = task % panels * PANEL;
        gate_and_up<U>(e, task / panels, c, std::min(PANEL, e.width - c));
    });
    share((e.hidden + PANEL - 1) / PANEL, threads, [&](int task) {
        weighted_down<U>(e, task * PANEL, std::min(PANEL, e.hidden - task * PANEL));
    });
}

}  // namespace

// hidden and width: multiples of 32 in bfloat16, of 16 in float32. Returns 0 for bfloat16 if this
// processor has no instructions for it.
extern "C" int millrace_run_experts(const void* x, const int64_t* experts, const int64_t* starts,
                                    const int64_t* tokens, const float* weights,
                                    const void* gate_up, const void* down, void* inner, float* out,
                                    int hits, int hidden, int width, int is_bf16, int threads) {
    int64_t work = starts[hits] * int64_t(hidden) * width;
    if (work <= 32 * SMALL) threads = 1;
    if (!is_bf16) {
        run_experts<FloatWords>({(const float*)x, experts, starts, tokens, weights,
                                 (const float*)gate_up, (const float*)down, (float*)inner, out,
                                 hits, hidden, width}, threads);
        return 1;
    }
#ifdef __AVX512BF16__
    run_experts<Bf16Pairs>({(const bf16*)x, experts, starts, tokens, weights, (const bf16*)gate_up,
                            (const bf16*)down, (bf16*)inner, out, hits, hidden, width}, threads);
    return 1;
#else
    return 0;
#endif
}
