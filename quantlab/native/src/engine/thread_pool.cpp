// The pool's threads, how long they spin before they sleep, and the units of work that they take from each other.
#include "thread_pool.h"

#include "../threads.h"
#include "bell.h"
#include "paying_threads.h"

#include <algorithm>
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

// How long a thread spins at a barrier at the most, and between runs: so long its core is its own. One that waits for
// longer at a barrier waits for a thread that has lost its core.
constexpr auto most_spinning = std::chrono::microseconds(100);
constexpr auto least_spinning = std::chrono::microseconds(2);
constexpr auto awake_between_runs = std::chrono::microseconds(70);

// A thread's waiting in the run that it is in. Spinning in vain is answered by spinning for half as long: threads that
// share a core would keep each other from it.
struct Waiting {
    Bell::Duration patience{0}, waited{0};

    void at(Bell& bell, std::uint32_t heard) {
        const Bell::Wait wait = bell.wait(heard, patience);
        waited += wait.took;
        if (patience == Bell::Duration(0)) return;
        patience = std::clamp<Bell::Duration>(wait.slept ? patience / 2 : patience * 2, least_spinning, most_spinning);
    }
};

thread_local Waiting waiting;

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
        all_ = static_cast<int>(others_.size()) + 1;
        size_ = all_;
        paying_ = PayingThreads(all_);
    }

    ~Crew() {
        stopping_ = true;
        runs_.ring();
        for (std::thread& other : others_) {
            other.join();
        }
    }

    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    bool is_of_this_process() const { return process_ == process(); }
    int size() const { return size_.load(std::memory_order_relaxed); }

    void run(const std::function<void(int)>& task, bool as_pays) {
        const std::lock_guard lock(one_run_);
        task_ = &task;
        failure_ = nullptr;
        failed_.store(false, std::memory_order_relaxed);
        if (all_ == 1) {
            call(0);
        } else {
            const Clock::time_point start = Clock::now();
            if (as_pays && paying_.choice(start.time_since_epoch()) == 1) {
                run_alone();
            } else {
                run_together();
                const Clock::time_point end = Clock::now();
                if (as_pays) paying_.take(end.time_since_epoch(), end - start, waiting.waited);
            }
        }
        if (failure_) {
            number_divisions_alike();
            std::rethrow_exception(failure_);
        }
    }

    // A failed thread comes to no more barriers: it counts as a meeting of all, and those who look later see failed_.
    void barrier() {
        if (size() == 1) return;
        const std::uint32_t meeting = meetings_.rings();
        if (failed_.load(std::memory_order_relaxed)) {
            throw OtherThreadFailed();
        }
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
            arrived_.store(0, std::memory_order_relaxed);
            meetings_.ring();
        } else {
            waiting.at(meetings_, meeting);
            if (failed_.load(std::memory_order_relaxed)) {
                throw OtherThreadFailed();
            }
        }
    }

    std::uint32_t next_division(int thread) { return ++shares_[static_cast<std::size_t>(thread)].divisions; }

    int take_unit(int thread, std::uint32_t division, int units) {
        const int threads = size();
        for (int i = 0; i < threads; ++i) {
            const int owner = (thread + i) % threads;
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
                first = static_cast<std::uint32_t>(std::int64_t{units} * owner / size());
                end = static_cast<std::uint32_t>(std::int64_t{units} * (owner + 1) / size());
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

    // After a failure, which threads meet at different places, and after runs that others had no part in.
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

    void run_together() {
        if (ran_alone_) number_divisions_alike();
        ran_alone_ = false;
        arrived_.store(0, std::memory_order_relaxed);
        busy_.store(all_ - 1, std::memory_order_relaxed);
        const std::uint32_t done = done_.rings();
        runs_.ring();
        call(0);
        waiting.at(done_, done);
    }

    void run_alone() {
        ran_alone_ = true;
        size_.store(1, std::memory_order_relaxed);
        call(0);
        size_.store(all_, std::memory_order_relaxed);
    }

    void work(int thread) {
        const Bell::Duration awake = may_spin_ ? awake_between_runs : Bell::Duration(0);
        for (std::uint32_t run = 0;; ++run) {
            runs_.wait(run, awake);
            if (stopping_) {
                return;
            }
            call(thread);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                done_.ring();
            }
        }
    }

    void call(int thread) {
        const DefaultFloatingPoint guard;
        waiting = {may_spin_ ? most_spinning : Bell::Duration(0), Bell::Duration(0)};
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
            meetings_.ring();
        }
    }

    const std::int64_t process_;
    const bool may_spin_;
    int all_ = 1;
    std::atomic<int> size_ = 1;  // that run a task: all_, or 1 in a run of the caller alone
    std::vector<std::thread> others_;
    std::vector<Share> shares_;
    PayingThreads paying_{1};
    bool ran_alone_ = false;
    std::mutex one_run_;
    std::mutex one_failure_;

    const std::function<void(int)>* task_ = nullptr;
    std::exception_ptr failure_;
    bool stopping_ = false;

    Bell runs_, done_, meetings_;
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
void ThreadPool::call_on_all(const std::function<void(int)>& task, bool as_pays) {
    Crew* crew = crew_.load(std::memory_order_acquire);
    if (!crew->is_of_this_process()) {
        auto ours = std::make_unique<Crew>(crew->size());  // never more threads than callers have counted on
        if (crew_.compare_exchange_strong(crew, ours.get())) {
            crew = ours.release();
        }
    }
    crew->run(task, as_pays);
}

}  // namespace quantlab::engine
