/* Products of float32 activations with matrices of integers: y = x W^T, exact sums of integers.
 *
 * Activations become 16-bit integers, row by row: x ~ a * step with |a| <= levels, step = max|x| / levels. A row's result
 * is exact up to the rounding of its activations and a few roundings of float32, and does not depend on other rows. Here
 * is what products of all matrices share: integers of activations, tasks of blocks, what becomes of the values. What
 * multiplies a block, and why that is fast, is in int8.c and int4.c. A matrix is read once by whatever number of rows up
 * to ROWS; more than STRIP rows go in strips while a block stays in the cache.
 */
#include "native.h"

#define ROWS 192 /* rows quantized at a time: their integers stay in the second-level cache up to 1,300 inputs */

typedef struct {
    const Matrix *matrix;
    Rows x;
    float *y;
    int64_t rows, y_stride, blocks_per_task;
    int mode;
} Product;

/* int16 of a row; the last quad of an int4 group may reach 2 behind the inputs. */
INLINE int64_t padded(const Matrix *m) { return round_up(m->inputs + (m->group ? 2 : 0), 32); }

INLINE void block_values(const Product *p, int64_t block, int64_t row, int rows, float *values) {
    (p->matrix->group ? int4_block : int8_block)(p->matrix, &p->x, block, row, rows, values);
}

INLINE __m256 silu_mul8(__m256 gate, __m256 up) {
    __m256 e = exp8(_mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), gate), _mm256_set1_ps(88.0f)));
    return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), up);
}

/* silu(gate) * up into `gate`, both [n]. */
INLINE void silu_mul(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(gate + i, silu_mul8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    if (i == n) return;
    float rest[2][8] = {{0}, {0}};
    memcpy(rest[0], gate + i, (n - i) * sizeof(float));
    memcpy(rest[1], up + i, (n - i) * sizeof(float));
    _mm256_storeu_ps(rest[0], silu_mul8(_mm256_loadu_ps(rest[0]), _mm256_loadu_ps(rest[1])));
    memcpy(gate + i, rest[0], (n - i) * sizeof(float));
}

static void product_task(void *context, int64_t task, int thread) {
    (void)thread;
    const Product *p = context;
    const Matrix *m = p->matrix;
    int both = p->mode == GATE_UP;
    int64_t outputs = both ? m->outputs / 2 : m->outputs, blocks = (outputs + BLOCK - 1) / BLOCK;
    int64_t end = least(blocks, (task + 1) * p->blocks_per_task);
    float values[STRIP * BLOCK], up[STRIP * BLOCK];
    for (int64_t b = task * p->blocks_per_task; b < end; b++) {
        int64_t width = least(BLOCK, outputs - b * BLOCK);
        for (int64_t row = 0; row < p->rows; row += STRIP) {
            int rows = (int)least(STRIP, p->rows - row);
            block_values(p, both ? 2 * b : b, row, rows, values);
            if (both) {
                block_values(p, 2 * b + 1, row, rows, up);
                silu_mul(values, up, rows * BLOCK);
            }
            for (int r = 0; r < rows; r++) {
                float *y = p->y + (row + r) * p->y_stride + b * BLOCK;
                if (p->mode == ADD)
                    for (int64_t i = 0; i < width; i++) y[i] += values[r * BLOCK + i];
                else
                    memcpy(y, values + r * BLOCK, width * sizeof(float));
            }
        }
    }
}

typedef struct {
    const float *x, *norm;
    float eps;
    const Matrix *matrix;
    int64_t x_stride, stride, rows, rows_per_task;
    int16_t *integers;
    float *step;
    int32_t *sums;
    float *normed; /* [threads, inputs] */
} Quantizing;

/* One row as integers; the largest magnitude is found on the bits, where a NaN is the largest: its step, and so all
 * results of the row, become NaN instead of plausible numbers. */
static void quantize_row(const float *x, int64_t n, int64_t levels, int16_t *out, int64_t stride, float *step) {
    int32_t bits = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t v;
        memcpy(&v, x + i, 4);
        v &= 0x7fffffff;
        bits = v > bits ? v : bits;
    }
    float largest;
    memcpy(&largest, &bits, 4);
    if (!(largest <= 3.4e38f)) {
        memset(out, 0, stride * sizeof(int16_t));
        *step = NAN;
        return;
    }
    if (largest < 1e-30f) largest = 1e-30f;
    *step = largest / (float)levels;
    __m256 inverse = _mm256_set1_ps((float)levels / largest);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm256_storeu_si256((__m256i *)(out + i), packed);
    }
    for (; i < n; i++) out[i] = (int16_t)_mm_cvtss_si32(_mm_set_ss(x[i] * _mm256_cvtss_f32(inverse)));
    memset(out + n, 0, (stride - n) * sizeof(int16_t));
}

static void rows_task(void *context, int64_t task, int thread) {
    const Quantizing *q = context;
    const Matrix *m = q->matrix;
    int64_t end = least(q->rows, (task + 1) * q->rows_per_task), groups = m->group ? groups_of(m) : 0;
    for (int64_t r = task * q->rows_per_task; r < end; r++) {
        const float *x = q->x + r * q->x_stride;
        if (q->norm != NULL) {
            float *normed = q->normed + thread * m->inputs;
            float factor = 1.0f / sqrtf(sum_of_squares(x, m->inputs) / (float)m->inputs + q->eps);
            for (int64_t i = 0; i < m->inputs; i++) normed[i] = x[i] * factor * q->norm[i];
            x = normed;
        }
        int16_t *integers = q->integers + r * q->stride;
        quantize_row(x, m->inputs, m->levels, integers, q->stride, q->step + r);
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (int64_t k = g * m->group; k < least((g + 1) * m->group, m->inputs); k++) sum += integers[k];
            q->sums[r * groups + g] = sum;
        }
    }
}

/* y = n W^T, or y += with mode ADD, or y = silu(n G^T) * (n U^T) with GATE_UP (blocks of gate and up alternate), where n
 * is x or, with `norm` [inputs] given, x / rms(x) * norm. x [rows, inputs] and y float32, strides in elements. */
void spq_linear(Pool *pool, const float *x, int64_t x_stride, int64_t rows, const float *norm, float eps,
                const Matrix *m, float *y, int64_t y_stride, int mode) {
    int64_t stride = padded(m);
    int threads = pool_threads(pool);
    int64_t most = least(rows, ROWS);
    size_t integers = round_up(most * stride * sizeof(int16_t), 64), steps = round_up(most * sizeof(float), 64);
    size_t sums = m->group ? round_up(most * groups_of(m) * sizeof(int32_t), 64) : 0;
    size_t normed = norm == NULL ? 0 : threads * m->inputs * sizeof(float);
    char *memory = pool_shared(pool, integers + steps + sums + normed);
    Quantizing q = {.norm = norm, .eps = eps, .matrix = m, .x_stride = x_stride, .stride = stride,
                    .integers = (int16_t *)memory, .step = (float *)(memory + integers),
                    .sums = (int32_t *)(memory + integers + steps), .normed = (float *)(memory + integers + steps + sums)};
    int64_t outputs = mode == GATE_UP ? m->outputs / 2 : m->outputs, blocks = (outputs + BLOCK - 1) / BLOCK;
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        q.x = x + begin * x_stride;
        q.rows = least(ROWS, rows - begin);
        q.rows_per_task = q.rows * m->inputs < 16384 ? q.rows : (q.rows + 4 * threads - 1) / (4 * threads);
        pool_run(pool, rows_task, &q, (q.rows + q.rows_per_task - 1) / q.rows_per_task);
        int64_t work = m->inputs * m->outputs * ((q.rows + 2) / 3); /* small products are done before a worker is awake */
        int64_t tasks = work < 65536 ? 1 : 8 * threads;
        Product p = {.matrix = m, .x = {q.integers, q.step, q.sums, stride}, .y = y + begin * y_stride, .rows = q.rows,
                     .y_stride = y_stride, .blocks_per_task = (blocks + tasks - 1) / tasks, .mode = mode};
        pool_run(pool, product_task, &p, (blocks + p.blocks_per_task - 1) / p.blocks_per_task);
    }
}

typedef struct {
    float *gate;
    const float *up;
    int64_t gate_stride, up_stride, rows, columns, rows_per_task;
} Silu;

static void silu_task(void *context, int64_t task, int thread) {
    (void)thread;
    const Silu *s = context;
    int64_t end = least(s->rows, (task + 1) * s->rows_per_task);
    for (int64_t r = task * s->rows_per_task; r < end; r++)
        silu_mul(s->gate + r * s->gate_stride, s->up + r * s->up_stride, s->columns);
}

/* silu(gate) * up into `gate`, where these are of two products; strides of rows in elements. */
void spq_silu_mul(Pool *pool, float *gate, int64_t gate_stride, const float *up, int64_t up_stride, int64_t rows,
                  int64_t columns) {
    int64_t tasks = rows * columns < 16384 ? 1 : 4 * pool_threads(pool);
    Silu s = {gate, up, gate_stride, up_stride, rows, columns, (rows + tasks - 1) / tasks};
    if (rows > 0) pool_run(pool, silu_task, &s, (rows + s.rows_per_task - 1) / s.rows_per_task);
}

/* Rows `ids` of a matrix as they were before packing, scaled: out float32 [count, inputs]. */
void spq_embed(const Matrix *m, const int64_t *ids, int64_t count, float *out) {
    for (int64_t r = 0; r < count; r++) (m->group ? int4_row : int8_row)(m, ids[r], out + r * m->inputs);
}
