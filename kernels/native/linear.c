/* Products of float32 activations with int8 matrices: y = (x Q^T) * scale, exact sums of integers.
 *
 * Activations become 16-bit integers, row by row: x ~ a * step with |a| <= levels, step = max|x| / levels. Two products
 * of 16 bits are added in one instruction (vpmaddwd; vpdpwssd with VNNI), which is twice the rate of float32 FMA without
 * VNNI and as fast as two 8-bit digits with it. `levels` and `segment` are chosen when a matrix is packed, so that no sum
 * leaves 32 bits: a row's result is exact up to the rounding of its activations, and does not depend on other rows.
 *
 * Layout of a matrix: blocks of 16 outputs; in a block pairs of inputs; of a pair 16 outputs x 2 inputs. It is read once,
 * from front to back, by whatever number of rows up to ROWS; more rows go in strips while a block stays in the cache.
 */
#include "native.h"

#ifdef __AVX512VNNI__
#define STRIP 12 /* rows of a register tile: enough independent sums to hide the latency of vpdpwssd */
#else
#define STRIP 6 /* 12 of 16 registers hold sums */
#endif
#define ROWS 192 /* rows quantized at a time: their integers stay in the second-level cache up to 1,300 inputs */

typedef struct {
    const Matrix *matrix;
    const int16_t *x; /* [rows, stride] */
    const float *step;
    float *y;
    int64_t rows, stride, y_stride, blocks_per_task;
    int mode;
} Product;

INLINE int64_t padded(int64_t inputs) { return round_up(inputs, 32); }

/* Sums of `rows` rows over `pairs` pairs of one block. */
INLINE void tile(const int16_t *x, int64_t stride, const int8_t *w, int64_t pairs, int32_t *sums, const int rows) {
#ifdef __AVX512VNNI__
    __m512i s[STRIP];
    for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_si512();
    for (int64_t p = 0; p < pairs; p++, w += 2 * BLOCK) {
        __m512i q = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + 2 * p, 4);
            s[r] = _mm512_dpwssd_epi32(s[r], q, _mm512_set1_epi32(pair));
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(sums + r * BLOCK, s[r]);
#else /* named sums, because gcc 12 spills an array of them */
    __m256i s00, s01, s10, s11, s20, s21, s30, s31, s40, s41, s50, s51;
    s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = s40 = s41 = s50 = s51 = _mm256_setzero_si256();
    for (int64_t p = 0; p < pairs; p++, w += 2 * BLOCK, x += 2) {
        __m256i q0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
        __m256i q1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + BLOCK)));
#define ROW(r)                                                            \
    if (rows > r) {                                                       \
        int32_t pair;                                                     \
        memcpy(&pair, x + r * stride, 4);                                 \
        __m256i a = _mm256_set1_epi32(pair);                              \
        s##r##0 = _mm256_add_epi32(s##r##0, _mm256_madd_epi16(a, q0));    \
        s##r##1 = _mm256_add_epi32(s##r##1, _mm256_madd_epi16(a, q1));    \
    }
        ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5)
#undef ROW
    }
#define ROW(r)                                                            \
    if (rows > r) {                                                       \
        _mm256_storeu_si256((__m256i *)(sums + r * BLOCK), s##r##0);      \
        _mm256_storeu_si256((__m256i *)(sums + r * BLOCK + 8), s##r##1);  \
    }
    ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5)
#undef ROW
#endif
}

static void tile_of(const int16_t *x, int64_t stride, const int8_t *w, int64_t pairs, int32_t *sums, int rows) {
    switch (rows) {
#define CASE(n) case n: tile(x, stride, w, pairs, sums, n); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if STRIP > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* Values float32 [rows, BLOCK] of one block: the sums of all segments, scaled. */
INLINE void block_values(const Product *p, int64_t block, int64_t row, int rows, float *values) {
    const Matrix *m = p->matrix;
    int32_t sums[STRIP * BLOCK];
    int64_t inputs = round_up(m->inputs, 2);
    const int8_t *w = m->packed + block * inputs * BLOCK;
    for (int64_t begin = 0; begin < inputs; begin += m->segment) {
        int64_t length = least(m->segment, inputs - begin);
        tile_of(p->x + row * p->stride + begin, p->stride, w + begin * BLOCK, length / 2, sums, rows);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < BLOCK; i++) {
                float sum = (float)sums[r * BLOCK + i];
                values[r * BLOCK + i] = begin == 0 ? sum : values[r * BLOCK + i] + sum;
            }
    }
    const float *scale = m->scale + block * BLOCK;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++) values[r * BLOCK + i] *= p->step[row + r] * scale[i];
}

/* silu(gate) * up into `gate`; gate and up [rows, BLOCK]. */
INLINE void silu_mul(float *gate, const float *up, int rows) {
    for (int i = 0; i < rows * BLOCK; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        __m256 e = exp8(_mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), g), _mm256_set1_ps(88.0f)));
        __m256 silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
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
                silu_mul(values, up, rows);
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
    int64_t inputs, x_stride, stride, levels, rows, rows_per_task;
    int16_t *integers;
    float *step;
    float *normed; /* [threads, inputs] */
} Rows;

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
    const Rows *q = context;
    int64_t end = least(q->rows, (task + 1) * q->rows_per_task);
    for (int64_t r = task * q->rows_per_task; r < end; r++) {
        const float *x = q->x + r * q->x_stride;
        if (q->norm != NULL) {
            float *normed = q->normed + thread * q->inputs;
            float factor = 1.0f / sqrtf(sum_of_squares(x, q->inputs) / (float)q->inputs + q->eps);
            for (int64_t i = 0; i < q->inputs; i++) normed[i] = x[i] * factor * q->norm[i];
            x = normed;
        }
        quantize_row(x, q->inputs, q->levels, q->integers + r * q->stride, q->stride, q->step + r);
    }
}

/* y = n W^T, or y += with mode ADD, or y = silu(n G^T) * (n U^T) with GATE_UP (blocks of gate and up alternate), where n
 * is x or, with `norm` [inputs] given, x / rms(x) * norm. x [rows, inputs] and y float32, strides in elements. */
void spq_linear(Pool *pool, const float *x, int64_t x_stride, int64_t rows, const float *norm, float eps,
                const Matrix *m, float *y, int64_t y_stride, int mode) {
    int64_t stride = padded(m->inputs);
    int threads = pool_threads(pool);
    int64_t most = least(rows, ROWS);
    size_t integers = round_up(most * stride * sizeof(int16_t), 64), steps = round_up(most * sizeof(float), 64);
    char *memory = pool_shared(pool, integers + steps + (norm == NULL ? 0 : threads * m->inputs * sizeof(float)));
    Rows q = {.norm = norm, .eps = eps, .inputs = m->inputs, .x_stride = x_stride, .stride = stride,
              .levels = m->levels, .integers = (int16_t *)memory, .step = (float *)(memory + integers),
              .normed = (float *)(memory + integers + steps)};
    int64_t outputs = mode == GATE_UP ? m->outputs / 2 : m->outputs, blocks = (outputs + BLOCK - 1) / BLOCK;
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        q.x = x + begin * x_stride;
        q.rows = least(ROWS, rows - begin);
        q.rows_per_task = q.rows * m->inputs < 16384 ? q.rows : (q.rows + 4 * threads - 1) / (4 * threads);
        pool_run(pool, rows_task, &q, (q.rows + q.rows_per_task - 1) / q.rows_per_task);
        int64_t work = m->inputs * m->outputs * ((q.rows + 2) / 3); /* small products are done before a worker is awake */
        int64_t tasks = work < 65536 ? 1 : 8 * threads;
        Product p = {.matrix = m, .x = q.integers, .step = q.step, .y = y + begin * y_stride, .rows = q.rows,
                     .stride = stride, .y_stride = y_stride, .blocks_per_task = (blocks + tasks - 1) / tasks,
                     .mode = mode};
        pool_run(pool, product_task, &p, (blocks + p.blocks_per_task - 1) / p.blocks_per_task);
    }
}

/* Rows `ids` of the matrix as they were before packing, scaled: out float32 [count, inputs]. */
void spq_embed(const Matrix *m, const int64_t *ids, int64_t count, float *out) {
    int64_t even = round_up(m->inputs, 2);
    for (int64_t r = 0; r < count; r++) {
        const int8_t *w = m->packed + ids[r] / BLOCK * even * BLOCK + ids[r] % BLOCK * 2;
        for (int64_t k = 0; k < m->inputs; k++)
            out[r * m->inputs + k] = (float)w[k / 2 * 2 * BLOCK + k % 2] * m->scale[ids[r]];
    }
}

/* Lay out int8 [outputs, inputs] (rows `stride` apart) as blocks; `packed` has round_up(outputs, BLOCK) * round_up(inputs, 2)
 * bytes. `every` 2 and `first` 0 or 1 place gate and up in alternate blocks. */
void spq_pack(const int8_t *weight, int64_t outputs, int64_t inputs, int64_t stride, int8_t *packed, int64_t every,
              int64_t first) {
    int64_t even = round_up(inputs, 2);
    for (int64_t b = 0; b * BLOCK < outputs; b++) {
        int8_t *block = packed + (b * every + first) * even * BLOCK;
        for (int64_t k = 0; k < even; k++)
            for (int64_t i = 0; i < BLOCK; i++) {
                int64_t row = b * BLOCK + i;
                block[k / 2 * 2 * BLOCK + 2 * i + k % 2] = row < outputs && k < inputs ? weight[row * stride + k] : 0;
            }
    }
}
