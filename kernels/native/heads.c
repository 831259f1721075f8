/* From projections to the cache: norms of query and key heads, rotary embedding, keys and values written to their slots. */
#include "native.h"

typedef struct {
    const Heads *heads;
    const Cache *cache;
    int64_t rows_per_task;
} Job;

#define WIDEST 512

/* One head of `width`: norm where there is one, then half-split rotation (Su et al. 2021, eq. 34). */
static void transform(const float *x, int64_t width, const float *norm, float eps, const float *cos, const float *sin,
                      float *out) {
    float normed[WIDEST];
    if (norm != NULL) {
        float factor = 1.0f / sqrtf(sum_of_squares(x, width) / (float)width + eps);
        for (int64_t i = 0; i < width; i++) normed[i] = x[i] * factor * norm[i];
        x = normed;
    }
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

static uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Write one head; int8 with a scale of absmax / 127, as the reference does. */
static void store(const float *x, int64_t width, void *cache, float *scale, int64_t index, int64_t kind) {
    int64_t first = index * width;
    if (kind == FLOAT32) {
        memcpy((float *)cache + first, x, width * sizeof(float));
    } else if (kind == BFLOAT16) {
        for (int64_t i = 0; i < width; i++) ((uint16_t *)cache)[first + i] = to_bfloat16(x[i]);
    } else if (kind == FLOAT16) {
        for (int64_t i = 0; i < width; i++)
            ((uint16_t *)cache)[first + i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
    } else {
        float largest = 0;
        int finite = 1;
        for (int64_t i = 0; i < width; i++) {
            float magnitude = fabsf(x[i]);
            largest = magnitude > largest ? magnitude : largest;
            finite &= magnitude <= 3.4e38f;
        }
        float step = largest / 127.0f;
        step = step < 1e-12f ? 1e-12f : step;
        scale[index] = finite ? step : NAN;
        int8_t *out = (int8_t *)cache + first;
        for (int64_t i = 0; i < width; i++) {
            float v = finite ? rintf(x[i] / step) : 0.0f;
            out[i] = (int8_t)(v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v);
        }
    }
}

static void heads_task(void *context, int64_t task, int thread) {
    (void)thread;
    const Job *job = context;
    const Heads *h = job->heads;
    const Cache *c = job->cache;
    int64_t width = c->width, end = least(h->rows, (task + 1) * job->rows_per_task);
    float key[WIDEST];
    for (int64_t r = task * job->rows_per_task; r < end; r++) {
        const float *cos = h->cos + r * (width / 2), *sin = h->sin + r * (width / 2);
        for (int64_t i = 0; i < h->query_heads; i++)
            transform(h->q + r * h->q_stride + i * width, width, h->q_norm, h->q_eps, cos, sin,
                      h->q_out + (r * h->query_heads + i) * width);
        for (int64_t i = 0; i < c->heads; i++) {
            int64_t index = h->slots[r] * c->heads + i;
            transform(h->k + r * h->k_stride + i * width, width, h->k_norm, h->k_eps, cos, sin, key);
            store(key, width, c->key, c->key_scale, index, c->kind);
            store(h->v + r * h->v_stride + i * width, width, c->value, c->value_scale, index, c->kind);
        }
    }
}

/* Rotate q into `q_out`, write rotated k, and v, to the slots of the cache. Heads are at most WIDEST (512) wide, even. */
void spq_heads(Pool *pool, const Heads *heads, const Cache *cache) {
    int64_t threads = pool_threads(pool), values = heads->rows * (heads->query_heads + 2 * cache->heads) * cache->width;
    int64_t tasks = values < 32768 ? 1 : 4 * threads;
    Job job = {heads, cache, (heads->rows + tasks - 1) / tasks};
    if (heads->rows > 0) pool_run(pool, heads_task, &job, (heads->rows + job.rows_per_task - 1) / job.rows_per_task);
}
