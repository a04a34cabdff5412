// Mixture of experts: the MLPs of the experts that have tokens, on panels as in gemm.h.
//
// The rows of x lie expert by expert. A panel of weights is packed once and meets all rows of its
// expert; weights of other experts are not read. A row's result does not depend on other rows.
// e4m3 weights are widened where they are packed, and their scales multiply the sums of each block.
#pragma once

#include "gemm.h"

namespace {

constexpr int SCALED = 128;  // rows and columns of e4m3 weights that have one scale

// One linear layer of all experts, [experts * rows, n]; scales: null if it has the inputs' dtype,
// else [experts * rows / SCALED, n / SCALED] of e4m3 values.
struct Stacked {
    const void* values;
    const float* scales;
};

template <class T> struct Experts {
    const T* x;              // [pairs, hidden]: a row for each token and expert of it
    const int64_t* experts;  // [hits]: those that have rows, ascending
    const int64_t* starts;   // [hits + 1]: where their rows begin
    const int64_t* tokens;   // [pairs]
    const float* weights;    // [pairs]
    Stacked gate_up;         // [experts, 2 width, hidden], gate first
    Stacked down;            // [experts, hidden, width]
    T* inner;                // [pairs, width]: scratch
    float* out;              // [tokens, hidden]: zeros at first
    int hits, hidden, width;
};

// The panel of `count` rows of w [., n] from `row` on; ahead: rows to the panel that comes next.
template <class U>
void pack_rows(const Stacked& w, int64_t row, int count, int64_t ahead, int n, Words (*panel)[2]) {
    typedef typename U::Element T;
    if (!w.scales) {
        auto at = [&](int i) { return (const T*)w.values + (row + i) * n; };
        pack(at, count, n / U::STEP, ahead * n * int64_t(sizeof(T)), panel);
        return;
    }
#ifdef __AVX512BF16__
    if constexpr (U::STEP == 2) {
        static const Widen widen;
        pack_loaded([&](int i, int word) {
            const uint8_t* codes = (const uint8_t*)w.values + (row + i) * n + 2 * word;
            if (ahead) __builtin_prefetch(codes + ahead * n, 0, 2);
            return widen(codes);
        }, count, n / 2, panel);
    }
#endif
}

// total[r] += x[r, n] times the panel of rows of w from `place` on.
template <class U, int R>
void meet_scaled(const typename U::Element* x, const Stacked& w, int64_t place,
                 const Words (*panel)[2], int n, Floats total[R][2]) {
    if (!w.scales) return meet<U, R>(x, n, panel, n, total);
    auto scales = w.scales + place / SCALED * (n / SCALED);
    for (int j = 0; j < n; j += SCALED) {
        Floats part[R][2] = {};
        meet<U, R>(x + j, n, panel + j / U::STEP, SCALED, part);
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++) total[r][half] += part[r][half] * scales[j / SCALED];
    }
}

// body(row, totals[2]): the products of rows [first, last) of x [rows, n] with `count` rows of w
// from `place` on.
template <class U, class Body>
void meet_panel(const typename U::Element* x, int64_t first, int64_t last, const Stacked& w,
                int64_t place, int count, int64_t ahead, int n, Body body) {
    int words = n / U::STEP;
    static thread_local std::vector<Words> scratch;
    scratch.resize(std::max(scratch.size(), size_t(2 * words)));
    auto panel = (Words(*)[2])scratch.data();
    pack_rows<U>(w, place, count, ahead, n, panel);
    in_runs(int(last - first), [&](auto run, int r) {
        constexpr int R = decltype(run)::value;
        Floats total[R][2] = {};
        meet_scaled<U, R>(x + (first + r) * n, w, place, panel, n, total);
        for (int i = 0; i < R; i++) body(first + r + i, total[i]);
    });
}

// inner = silu(gate(x)) * up(x), for columns [c, c + count) of one expert.
template <class U>
void gate_and_up(const Experts<typename U::Element>& e, int hit, int c, int count) {
    typedef typename U::Element T;
    int64_t first = e.starts[hit], last = e.starts[hit + 1];
    int64_t gate = e.experts[hit] * 2 * e.width + c, up = gate + e.width;
    static thread_local std::vector<Floats> gates;
    gates.resize(std::max(gates.size(), size_t(2 * (last - first))));
    auto keep = [&](int64_t row, Floats* total) {
        gates[2 * (row - first)] = total[0];
        gates[2 * (row - first) + 1] = total[1];
    };
    meet_panel<U>(e.x, first, last, e.gate_up, gate, count, e.width, e.hidden, keep);
    auto finish = [&](int64_t row, Floats* total) {
        T* to = e.inner + row * e.width + c;
        const float* gate_values = (const float*)&gates[2 * (row - first)];
        const float* up_values = (const float*)total;
        for (int part = 0; part < count; part += LANES)  // of a length that compilers vectorise
            for (int i = part; i < part + LANES; i++) put(to + i, silu(gate_values[i]) * up_values[i]);
    };
    meet_panel<U>(e.x, first, last, e.gate_up, up, count, 0, e.hidden, finish);
}

// out += weight * down(inner), for columns [c, c + count), expert by expert.
template <class U> void weighted_down(const Experts<typename U::Element>& e, int c, int count) {
    for (int hit = 0; hit < e.hits; hit++) {
        int64_t down = e.experts[hit] * e.hidden + c;
        int64_t first = e.starts[hit], last = e.starts[hit + 1];
        auto add = [&](int64_t row, Floats* total) {
            float* to = e.out + e.tokens[row] * e.hidden + c;
            for (int part = 0; part < count / LANES; part++, to += LANES) {
                Floats sum;
                std::memcpy(&sum, to, sizeof sum);
                sum += e.weights[row] * total[part];
                std::memcpy(to, &sum, sizeof sum);
            }
        };
        meet_panel<U>(e.inner, first, last, e.down, down, count, 0, e.width, add);
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

// hidden and width: multiples of 32 in bfloat16, of 16 in float32, of 128 where there are scales: of
// e4m3 weights, with x in bfloat16. Returns 0 for bfloat16 if this processor has no instructions for
// it.
extern "C" int millrace_run_experts(const void* x, const int64_t* experts, const int64_t* starts,
                                    const int64_t* tokens, const float* weights,
                                    const void* gate_up, const float* gate_up_scales,
                                    const void* down, const float* down_scales, void* inner,
                                    float* out, int hits, int hidden, int width, int is_bf16, int threads) {
    Stacked first = {gate_up, gate_up_scales}, second = {down, down_scales};
    int64_t work = starts[hits] * int64_t(hidden) * width;
    if (work <= 32 * SMALL) threads = 1;
    if (!is_bf16) {
        if (gate_up_scales || down_scales) return 0;
        run_experts<FloatWords>({(const float*)x, experts, starts, tokens, weights, first, second,
                                 (float*)inner, out, hits, hidden, width}, threads);
        return 1;
    }
#ifdef __AVX512BF16__
    run_experts<Bf16Pairs>({(const bf16*)x, experts, starts, tokens, weights, first, second,
                            (bf16*)inner, out, hits, hidden, width}, threads);
    return 1;
#else
    return 0;
#endif
}
