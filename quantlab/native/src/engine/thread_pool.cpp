// The pool's threads, and how they wait: first spinning, then letting others have the core, then asleep.
#include "thread_pool.h"

#include "../threads.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace quantlab::engine {

namespace {

using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// How long a waiting thread keeps its core to itself, and how long it is awake. One that waits for longer at a barrier
// waits for a thread that has lost its core: asleep, it leaves its own core to that thread.
constexpr auto spinning = std::chrono::microseconds(20);
constexpr auto awake_at_barrier = std::chrono::milliseconds(1);
constexpr auto awake_between_runs = std::chrono::microseconds(70);

// Returns once `word` is not `value`.
void wait_for_change(const std::atomic<std::uint32_t>& word, std::uint32_t value, bool may_spin,
                     Clock::duration awake) {
    constexpr int spins_a_look = 64;  // at the clock, of 10 to 40 ns each
    for (int i = 0; may_spin && i < spins_a_look; ++i) {
        if (word.load(std::memory_order_acquire) != value) {
            return;
        }
        relax();
    }
    const Clock::time_point start = Clock::now();
    for (;;) {
        const Clock::duration waited = Clock::now() - start;
        if (waited > awake) {
            word.wait(value, std::memory_order_acquire);
            return;
        }
        for (int i = 0; i < spins_a_look; ++i) {
            if (word.load(std::memory_order_acquire) != value) {
                return;
            }
            if (may_spin && waited < spinning) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }
}

// A system call only if a thread sleeps on the word.
void change(std::atomic<std::uint32_t>& word) {
    word.fetch_add(1, std::memory_order_release);
    word.notify_all();
}

int available_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return CPU_COUNT(&set);
    }
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

// Thrown at barriers when another thread's task has failed; never leaves run().
struct OtherThreadFailed {};

// A thread is born with the signals its maker lets through: none. Python's handlers run on the main thread.
class SignalsBlocked {
public:
#if defined(__unix__) || defined(__APPLE__)
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &saved_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

private:
    sigset_t saved_;
#endif
};

std::int64_t process() {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

}  // namespace

// The threads of one process. A forked child has this memory, but not the threads: it leaves the object as it is,
// locks and all, and makes another.
class ThreadPool::Crew {
public:
    explicit Crew(int threads)
        : process_(process()), may_spin_(threads <= available_processors()), shares_(static_cast<std::size_t>(threads)) {
        const SignalsBlocked blocked;
        others_.reserve(static_cast<std::size_t>(threads - 1));
        for (int thread = 1; thread < threads; ++thread) {
            try {
                others_.emplace_back([this, thread] { work(thread); });
            } catch (const std::exception&) {
                break;
            }
        }
        size_ = static_cast<int>(others_.size()) + 1;
    }

    ~Crew() {
        stopping_ = true;
        change(runs_);
        for (std::thread& other : others_) {
            other.join();
        }
    }

    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    bool is_of_this_process() const { return process_ == process(); }
    int size() const { return size_; }

    void run(const std::function<void(int)>& task) {
        const std::lock_guard lock(one_run_);
        task_ = &task;
        failure_ = nullptr;
        failed_.store(false, std::memory_order_relaxed);
        arrived_.store(0, std::memory_order_relaxed);
        busy_.store(size_ - 1, std::memory_order_relaxed);
        const std::uint32_t done = done_.load(std::memory_order_relaxed);
        if (size_ > 1) {
            change(runs_);
        }
        call(0);
        if (size_ > 1) {
            wait_for_change(done_, done, may_spin_, awake_at_barrier);
        }
        if (failure_) {
            number_divisions_alike();
            std::rethrow_exception(failure_);
        }
    }

    // A failed thread comes to no more barriers: it counts as a meeting of all, and those who look later see failed_.
    void barrier() {
        const std::uint32_t meeting = meetings_.load(std::memory_order_acquire);
        if (failed_.load(std::memory_order_relaxed)) {
            throw OtherThreadFailed();
        }
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
                change(meetings_);
        } else {
            wait_for_change(meetings_, meeting, may_spin_, awake_at_barrier);
            if (failed_.load(std::memory_order_relaxed)) {
                throw OtherThreadFailed();
            }
        }
    }

    std::uint32_t next_division(int thread) { return ++shares_[static_cast<std::size_t>(thread)].divisions; }

    int take_unit(int thread, std::uint32_t division, int units) {
        for (int i = 0; i < size_; ++i) {
            const int owner = (thread + i) % size_;
            const int unit = take_unit_of(owner, i == 0, division, units);
            if (unit >= 0) {
                return unit;
            }
        }
        return -1;
    }

private:
    // What nobody has taken of a thread's units in a division. Whoever looks first puts them there.
    struct alignas(64) Share {
        std::atomic<std::uint64_t> left = 0;  // the division in the upper half, then first unit and end in 16 bits each
        std::uint32_t divisions = 0;          // that its thread has come to; its thread's alone
    };

    static std::uint64_t word(std::uint32_t division, std::uint32_t first, std::uint32_t end) {
        return std::uint64_t{division} << 32 | first << 16 | end;
    }

    // The owner takes its first unit, others its last; -1 where none is left.
    int take_unit_of(int owner, bool from_front, std::uint32_t division, int units) {
        std::atomic<std::uint64_t>& left = shares_[static_cast<std::size_t>(owner)].left;
        std::uint64_t seen = left.load(std::memory_order_relaxed);
        for (;;) {
            auto first = static_cast<std::uint32_t>(seen >> 16 & 0xffff), end = static_cast<std::uint32_t>(seen & 0xffff);
            const auto ahead = static_cast<std::int32_t>(static_cast<std::uint32_t>(seen >> 32) - division);
            if (ahead > 0) {
                return -1;  // the owner has come further: nothing of this division is left
            }
            if (ahead < 0) {
                first = static_cast<std::uint32_t>(std::int64_t{units} * owner / size_);
                end = static_cast<std::uint32_t>(std::int64_t{units} * (owner + 1) / size_);
            } else if (first == end) {
                return -1;
            }
            const bool empty = first == end;
            const std::uint32_t unit = from_front ? first : end - 1;
            const std::uint64_t rest = empty        ? word(division, first, end)
                                       : from_front ? word(division, first + 1, end)
                                                    : word(division, first, end - 1);
            if (left.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) {
                return empty ? -1 : static_cast<int>(unit);
            }
        }
    }

    // After a failure, which threads meet at different places.
    void number_divisions_alike() {
        std::uint32_t most = shares_[0].divisions;
        for (const Share& share : shares_) {
            if (static_cast<std::int32_t>(share.divisions - most) > 0) {
                most = share.divisions;
            }
        }
        for (Share& share : shares_) {
            share.divisions = most;
        }
    }

    int take_part_of(int owner, bool first, std::uint32_t division, int parts) {
        std::atomic<std::uint64_t>& left = shares_[static_cast<std::size_t>(owner)].left;
        const std::uint64_t mark = std::uint64_t{division} << 32;
        std::uint64_t seen = left.load(std::memory_order_relaxed);
        for (;;) {
            std::uint64_t begin = seen >> 16 & 0xffff, end = seen & 0xffff;
            if (seen >> 32 != division) {
                if (static_cast<std::int32_t>(static_cast<std::uint32_t>(seen >> 32) - division) > 0) {
                    return -1;  // the owner is beyond this division: nothing of it is left
                }
                begin = static_cast<std::uint64_t>(parts) * static_cast<std::uint64_t>(owner) / static_cast<std::uint64_t>(size_);
                end = static_cast<std::uint64_t>(parts) * static_cast<std::uint64_t>(owner + 1) / static_cast<std::uint64_t>(size_);
            }
            if (begin == end) {
                return -1;
            }
            const std::uint64_t part = first ? begin : end - 1;
            const std::uint64_t rest = first ? (begin + 1) << 16 | end : begin << 16 | (end - 1);
            if (left.compare_exchange_weak(seen, mark | rest, std::memory_order_relaxed)) {
                return static_cast<int>(part);
            }
        }
    }

    void work(int thread) {
        for (std::uint32_t run = 0;; ++run) {
            wait_for_change(runs_, run, may_spin_, awake_between_runs);
            if (stopping_) {
                return;
            }
            call(thread);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                change(done_);
            }
        }
    }

    void call(int thread) {
        const DefaultFloatingPoint guard;
        try {
            (*task_)(thread);
        } catch (const OtherThreadFailed&) {  // the other's exception is the one to report
        } catch (...) {
            fail(std::current_exception());
        }
    }

    void fail(std::exception_ptr failure) {
        const std::lock_guard lock(one_failure_);
        if (!failure_) {
            failure_ = std::move(failure);
            failed_.store(true, std::memory_order_relaxed);
            change(meetings_);
        }
    }

    const std::int64_t process_;
    const bool may_spin_;
    int size_ = 1;
    std::vector<std::thread> others_;
    std::vector<Share> shares_;
    std::mutex one_run_;
    std::mutex one_failure_;

    const std::function<void(int)>* task_ = nullptr;
    std::exception_ptr failure_;
    bool stopping_ = false;

    // Each in a cache line of its own: threads that spin on one do not slow those that write another.
    alignas(64) std::atomic<std::uint32_t> runs_ = 0;
    alignas(64) std::atomic<std::uint32_t> done_ = 0;
    alignas(64) std::atomic<std::uint32_t> meetings_ = 0;
    alignas(64) std::atomic<int> busy_ = 0;
    alignas(64) std::atomic<int> arrived_ = 0;
    std::atomic<bool> failed_ = false;
};

ThreadPool::ThreadPool(int threads) : crew_(new Crew(threads)) {}

ThreadPool::~ThreadPool() {
    if (crew_.load()->is_of_this_process()) {
        delete crew_.load();
    }
}

int ThreadPool::size() const { return crew_.load(std::memory_order_acquire)->size(); }

void ThreadPool::barrier() { crew_.load(std::memory_order_acquire)->barrier(); }

std::uint32_t ThreadPool::next_division(int thread) {
    return crew_.load(std::memory_order_acquire)->next_division(thread);
}

int ThreadPool::take_unit(int thread, std::uint32_t division, int units) {
    return crew_.load(std::memory_order_acquire)->take_unit(thread, division, units);
}

// Several of a child's threads may come here at once: the first one's crew is everyone's.
void ThreadPool::call_on_all(const std::function<void(int)>& task) {
    Crew* crew = crew_.load(std::memory_order_acquire);
    if (!crew->is_of_this_process()) {
        auto ours = std::make_unique<Crew>(crew->size());  // never more threads than callers have counted on
        if (crew_.compare_exchange_strong(crew, ours.get())) {
            crew = ours.release();
        }
    }
    crew->run(task);
}

}  // namespace quantlab::engine
