/* Threads that share one operation at a time, task by task.
 *
 * Why not OpenMP: its barriers wait for every thread, also for one that the machine gave to somebody else before it had
 * begun. Here a thread takes the next task when it is free, so the caller waits only for tasks that were really taken.
 * Workers spin for a moment between operations (the next one of a step follows within microseconds), then sleep.
 */
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MOST_THREADS 64
#define MOST_TASKS 0xffff
#define SPINS 4000 /* pauses before a worker sleeps: about 50 us on a Zen 3 */

typedef struct {
    void *memory;
    size_t bytes;
} Scratch;

struct Pool {
    /* Job number (32 bits), its tasks (16), the next of them (16). In one word, so that a worker that comes late cannot
     * take a task of another job. */
    _Alignas(64) _Atomic uint64_t claim;
    _Alignas(64) _Atomic int64_t done;
    _Atomic(Task) task;
    _Atomic(void *) context;
    _Atomic int limit; /* threads that may work, the caller included */
    _Atomic int sleeping, stopping;
    int threads;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t workers[MOST_THREADS];
    Scratch scratch[MOST_THREADS + 1];
};

typedef struct {
    Pool *pool;
    int thread;
} Start;

/* Take tasks of the current job until there are none. `task` and `context` change only when all tasks of a job are
 * taken and done, so what was read before a successful claim belongs to the claimed job. */
static void work(Pool *pool, int thread) {
    for (;;) {
        uint64_t claim = atomic_load_explicit(&pool->claim, memory_order_acquire);
        Task task = atomic_load_explicit(&pool->task, memory_order_relaxed);
        void *context = atomic_load_explicit(&pool->context, memory_order_relaxed);
        uint64_t next = claim & 0xffff, count = claim >> 16 & 0xffff;
        if (next >= count) return;
        if (!atomic_compare_exchange_weak_explicit(&pool->claim, &claim, claim + 1, memory_order_acq_rel,
                                                   memory_order_relaxed))
            continue;
        task(context, (int64_t)next, thread);
        atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
    }
}

static void *worker(void *argument) {
    Start start = *(Start *)argument;
    free(argument);
    Pool *pool = start.pool;
    uint64_t seen = 0;
    while (!atomic_load(&pool->stopping)) {
        int spins = 0;
        while ((atomic_load_explicit(&pool->claim, memory_order_acquire) >> 32) == seen && spins < SPINS) {
            _mm_pause();
            spins++;
        }
        uint64_t job = atomic_load_explicit(&pool->claim, memory_order_acquire) >> 32;
        if (job == seen || start.thread >= atomic_load_explicit(&pool->limit, memory_order_relaxed)) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleeping, 1);
            while ((atomic_load(&pool->claim) >> 32) == job && !atomic_load(&pool->stopping))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleeping, 1);
            pthread_mutex_unlock(&pool->mutex);
            seen = job;
            continue;
        }
        seen = job;
        work(pool, start.thread);
    }
    return NULL;
}

/* Whether this CPU has every instruction that this build may use. */
int spq_supported(void) {
    int supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
#ifdef __AVX512VNNI__
    supported = supported && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return supported;
}

/* A pool of `threads` (the caller of an operation counts as one), or NULL where the system gives none. */
Pool *spq_pool_new(int threads) {
    Pool *pool = aligned_alloc(64, round_up(sizeof(Pool), 64));
    if (pool == NULL) return NULL;
    memset(pool, 0, sizeof(Pool));
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    for (int i = 1; i < threads; i++) {
        Start *start = malloc(sizeof(Start));
        if (start == NULL) break;
        *start = (Start){pool, i};
        if (pthread_create(&pool->workers[i], NULL, worker, start) != 0) {
            free(start);
            break;
        }
        pool->threads = i + 1;
    }
    atomic_store(&pool->limit, pool->threads);
    return pool;
}

/* Let only the first `threads` threads of the pool work. */
void spq_pool_limit(Pool *pool, int threads) {
    atomic_store(&pool->limit, threads < 1 ? 1 : threads > pool->threads ? pool->threads : threads);
}

/* End the threads and free everything; no operation may run. */
void spq_pool_free(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stopping, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    for (int i = 0; i <= MOST_THREADS; i++) free(pool->scratch[i].memory);
    free(pool);
}

int pool_threads(const Pool *pool) { return atomic_load_explicit(&((Pool *)pool)->limit, memory_order_relaxed); }

void pool_run(Pool *pool, Task task, void *context, int64_t count) {
    if (count <= 1 || count > MOST_TASKS || pool_threads(pool) == 1) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    atomic_store_explicit(&pool->task, task, memory_order_relaxed);
    atomic_store_explicit(&pool->context, context, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    uint64_t job = (atomic_load_explicit(&pool->claim, memory_order_relaxed) >> 32) + 1;
    atomic_store(&pool->claim, job << 32 | (uint64_t)count << 16);
    if (atomic_load(&pool->sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    work(pool, 0);
    for (int spins = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < count; spins++) {
        if (spins < SPINS)
            _mm_pause();
        else
            sched_yield();
    }
}

static void *grow(Scratch *scratch, size_t bytes) {
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        scratch->bytes = round_up((int64_t)bytes, 4096);
        scratch->memory = aligned_alloc(64, scratch->bytes);
        if (scratch->memory == NULL) abort(); /* a few MiB at most: the process is out of memory */
    }
    return scratch->memory;
}

void *pool_scratch(Pool *pool, int thread, size_t bytes) { return grow(&pool->scratch[thread], bytes); }
void *pool_shared(Pool *pool, size_t bytes) { return grow(&pool->scratch[MOST_THREADS], bytes); }
