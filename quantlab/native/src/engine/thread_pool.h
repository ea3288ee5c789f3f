// Threads that wait for work, and meet at barriers inside it. The caller is one of them: thread 0.
#pragma once

#include <atomic>
#include <functional>

namespace quantlab::engine {

// Between runs the other threads spin for some 50 microseconds and then sleep, so that an idle engine costs nothing.
//
// run() may be called from any thread, one call at a time (a second waits), never from inside a task. After a fork the
// child's pool starts threads of its own when it first runs. No thread of a pool handles signals.
class ThreadPool {
public:
    // `threads` at least 1. Where the system refuses a thread the pool is smaller: see size().
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // How many threads a task runs on. Changes only in run(), in a forked child that the system refuses threads.
    int size() const;

    // Calls task(thread) for thread = 0 .. size() - 1, all at the same time, and returns when all are done. Floating
    // point is set to its default inside (rounding to nearest, subnormals kept), whatever the caller has set.
    //
    // The first exception of a task is thrown here, once all threads are done; those at a barrier then, or coming to
    // one later, are unwound by an exception of their own.
    template <typename Task>
    void run(Task&& task) {
        call_on_all(std::ref(task));
    }

    // Inside a task: waits until all threads are here. What any of them wrote before is seen by all after it.
    void barrier();

    // Inside a task, called by all threads: calls work(part) for parts 0 .. parts - 1, each by the first thread that
    // is free for it, and then meets at a barrier. Evens out cores that others use too. `work` must not meet barriers.
    template <typename Work>
    void share(int parts, const Work& work) {
        for (int part = next_part(); part < parts; part = next_part()) {
            work(part);
        }
        barrier();
    }

private:
    class Crew;

    void call_on_all(const std::function<void(int)>& task);
    int next_part();

    std::atomic<Crew*> crew_;  // owned, unless it is another process's
};

}  // namespace quantlab::engine
