// A few threads that share a job with their caller. Idle, they sleep and cost nothing.
#ifndef WARMROUTE_POOL_HPP
#define WARMROUTE_POOL_HPP

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace wr {

// Work on [0, size) in pieces; `work` is called from several threads at once with the `state` it was given.
struct Job {
    void (*work)(void *state, int64_t begin, int64_t end);
    void *state;
    int64_t size, piece;
};

class Pool {
  public:
    // As many threads as can be had, up to `helpers`, beside the caller's.
    explicit Pool(int helpers) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            threads_.reserve((size_t)helpers);
            for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
        } catch (const std::system_error &) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(lock_);
            stopped_ = true;
        }
        wake_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int helpers() const { return (int)threads_.size(); }

    // Returns when all of the job is done. Helpers that wake too late find nothing left and are not waited for.
    void run(const Job &job, int helpers) {
        {
            std::lock_guard<std::mutex> hold(lock_);
            job_ = job;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = helpers;
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        take(job);
        std::unique_lock<std::mutex> hold(lock_);
        wanted_ = 0;
        idle_.wait(hold, [this] { return working_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> hold(lock_);
        for (;;) {
            wake_.wait(hold, [this] { return stopped_ || wanted_ > 0; });
            if (stopped_) return;
            --wanted_;
            ++working_;
            Job job = job_;
            hold.unlock();
            take(job);
            hold.lock();
            if (--working_ == 0) idle_.notify_one();
        }
    }

    void take(const Job &job) {
        for (;;) {
            int64_t begin = next_.fetch_add(job.piece, std::memory_order_relaxed);
            if (begin >= job.size) return;
            int64_t end = job.size - begin > job.piece ? begin + job.piece : job.size;
            job.work(job.state, begin, end);
        }
    }

    std::mutex lock_;
    std::condition_variable wake_, idle_;
    std::atomic<int64_t> next_{0};
    Job job_{};
    int wanted_ = 0, working_ = 0;
    bool stopped_ = false;
    std::vector<std::thread> threads_;
};

// The pool of one context, made at the first job that is worth it. In a child of fork() its threads do not exist and its
// locks are in an unknown state, so the child makes another and leaves the parent's alone.
class Helpers {
  public:
    explicit Helpers(int threads) : threads_(threads) {}
    ~Helpers() {
        if (owner_ == getpid()) delete pool_;
    }

    Helpers(const Helpers &) = delete;
    Helpers &operator=(const Helpers &) = delete;

    int threads() const { return threads_; }

    void run(const Job &job) {
        int64_t pieces = (job.size + job.piece - 1) / job.piece;
        int wanted = pieces < threads_ ? (int)pieces - 1 : threads_ - 1;
        if (wanted > 0 && ready()) {
            pool_->run(job, wanted < pool_->helpers() ? wanted : pool_->helpers());
        } else if (job.size > 0) {
            job.work(job.state, 0, job.size);
        }
    }

  private:
    bool ready() {
        pid_t process = getpid();
        if (owner_ != process) {
            pool_ = new (std::nothrow) Pool(threads_ - 1);
            owner_ = process;
        }
        return pool_ != nullptr;
    }

    int threads_;
    pid_t owner_ = 0;
    Pool *pool_ = nullptr;
};

// Processors that this process may use.
inline int usable_cores() {
    cpu_set_t set;
    int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
    return count > 0 ? count : 1;
}

}  // namespace wr

#endif
