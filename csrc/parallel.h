// A loop over rows on a few threads that stay alive between calls.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace stars_fast {

class ThreadPool {
public:
    // The pool of this process. Threads do not survive a fork, so a child gets a pool of its own; the parent's is
    // leaked there, and at exit everywhere, because its threads may still wait inside it.
    static ThreadPool& instance() {
        static std::mutex mutex;
        static ThreadPool* pool = nullptr;
        static pid_t owner = 0;
        const std::lock_guard<std::mutex> lock(mutex);
        if (pool == nullptr || owner != getpid()) {
            pool = new ThreadPool;
            owner = getpid();
        }
        return *pool;
    }

    // Calls body(context, i) for every i in [0, count), on at most `threads` threads, this one included.
    void run(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
        // Another Python thread may be using the pool: do not wait for it.
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            for (int64_t i = 0; i < count; ++i) body(context, i);
            return;
        }
        const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
        while (static_cast<int>(workers_.size()) < helpers) {
            const int index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index] { work(index); });
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = body;
            context_ = context;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            helpers_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        drain(body, context, count);
        std::unique_lock<std::mutex> lock(mutex_);
        helpers_ = 0;  // nothing is left for threads that have not woken yet, so they are not waited for
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void drain(void (*body)(void*, int64_t), void* context, int64_t count) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
    }

    void work(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            const auto body = body_;
            void* const context = context_;
            const int64_t count = count_;
            ++busy_;
            lock.unlock();
            drain(body, context, count);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<int64_t> next_{0};
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0;
    int helpers_ = 0, busy_ = 0;
    uint64_t generation_ = 0;
};

// The threads on which torch has just run a matrix product: they are awake, and wait for more with all their might, so
// that threads of our own would have to share the cores with them. Found by name in the process, as nothing here is
// compiled against torch; where its OpenMP has another interface, the pool above steps in.
using Team = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
inline const pid_t loaded_in = getpid();

inline Team team_of_torch() {
    static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return loaded_in == getpid() ? team : nullptr;  // a team does not survive a fork
}

// body(i) for every i in [0, count). `work` is the number of elements touched in all: small loops stay on this thread.
// What a body throws (for want of memory) is thrown again here, the first of it, after the others have run.
template <class Body>
void parallel_for(int64_t count, double work, int threads, const Body& body) {
    constexpr double kWorthWaking = 1 << 16;  // elements; about the time that waking a thread takes
    if (threads <= 1 || count <= 1 || work < kWorthWaking) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    struct Loop {
        const Body& body;
        const int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        std::exception_ptr error{};

        void run(int64_t i) {
            try {
                body(i);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    } loop{body, count};
    if (const Team team = team_of_torch()) {
        team(
            [](void* context) {
                Loop& shared = *static_cast<Loop*>(context);
                for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) {
                    shared.run(i);
                }
            },
            &loop, static_cast<unsigned>(threads), 0);
    } else {
        ThreadPool::instance().run(
            count, threads, [](void* context, int64_t i) { static_cast<Loop*>(context)->run(i); }, &loop);
    }
    if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace stars_fast
