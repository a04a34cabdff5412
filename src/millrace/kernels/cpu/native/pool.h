// Distributes tasks over threads, on machines whose cores have other work as well.
//
// The caller runs tasks too, and waits only for tasks that another thread has begun: a thread that
// wakes late, or is not scheduled, costs nothing. Idle threads spin for a moment (the next call mostly
// comes within it) and then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>

#include "base.h"

namespace {

constexpr std::chrono::microseconds LOOK{50};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
  public:
    typedef void (*Body)(void* context, int task);

    // One caller at a time; a second one runs its tasks alone.
    void run(int tasks, int threads, Body body, void* context) {
        if (tasks < 2 || threads < 2 || !caller_.try_lock()) {
            for (int task = 0; task < tasks; task++) body(context, task);
            return;
        }
        while (workers_ < threads - 1) start(workers_++);
        body_ = body, context_ = context, tasks_ = tasks, helpers_ = threads - 1;
        next_ = 0;
        open_ = true;
        call_++;
        if (asleep_ > 0) {
            std::lock_guard<std::mutex> hold(sleep_);
            wake_.notify_all();
        }
        take_tasks();
        open_ = false;
        for (int round = 0; inside_ > 0; round++) round < 1000 ? pause() : std::this_thread::yield();
        caller_.unlock();
    }

  private:
    void start(int worker) {
        std::thread([this, worker] { work(worker); }).detach();
    }
    void take_tasks() {
        for (int task; (task = next_++) < tasks_;) body_(context_, task);
    }
    // Either this sees that the call is closed, or the caller sees that somebody is inside.
    void work(int worker) {
        for (uint64_t seen = 0;; seen = wait_for_call(seen)) {
            inside_++;
            if (open_ && worker < helpers_) take_tasks();
            inside_--;
        }
    }
    uint64_t wait_for_call(uint64_t seen) {
        auto until = std::chrono::steady_clock::now() + LOOK;
        do
            for (int i = 0; i < 32; i++) {
                if (call_ != seen) return call_;
                pause();
            }
        while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> hold(sleep_);
        asleep_++;
        wake_.wait(hold, [&] { return call_ != seen; });
        asleep_--;
        return call_;
    }

    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    int workers_ = 0, tasks_ = 0, helpers_ = 0;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::atomic<uint64_t> call_{0};
    std::atomic<int> next_{0}, inside_{0}, asleep_{0};
    std::atomic<bool> open_{false};
};

// body(task) for every task, in any order, on up to `threads` threads.
template <class Body> void share(int tasks, int threads, Body body) {
    static Pool* pool = new Pool;  // never destroyed: its threads run until the process ends
    pool->run(tasks, threads, [](void* context, int task) { (*(Body*)context)(task); }, &body);
}
// The same for rows of n elements, several at a time.
template <class Body> void share_rows(int64_t rows, int n, int threads, Body body) {
    int64_t step = std::max<int64_t>(1, SMALL / 2 / n);
    share(int((rows + step - 1) / step), threads, [&](int task) {
        for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); r++) body(r);
    });
}

// A thread's own T, made again when `sizes` change.
template <class T, class... Sizes> T& room_of(const Sizes&... sizes) {
    static thread_local std::optional<T> scratch;
    static thread_local std::tuple<Sizes...> made_from;
    if (!scratch || made_from != std::tuple<Sizes...>(sizes...)) {
        scratch.emplace(sizes...);
        made_from = std::tuple<Sizes...>(sizes...);
    }
    return *scratch;
}

}  // namespace
