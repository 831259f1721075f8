/* Fused integer operations of a LLaMA on x86-64: what the files of this folder share.
 *
 * Not a general library: kernels.native.library is the only caller and checks shapes and pointers. Plain C, no Python
 * in it; one build per instruction set (pyproject.toml), the machine's best is chosen when it is loaded.
 */
#ifndef SPQ_NATIVE_H
#define SPQ_NATIVE_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16 /* outputs of a matrix block */
#define INLINE static inline __attribute__((always_inline))

/* ---- pool.c: threads that share a job task by task ---- */

typedef struct Pool Pool;
typedef void (*Task)(void *context, int64_t task, int thread);

/* Run tasks 0 .. count-1 on all threads of the pool, the caller among them (as thread 0), and return when all are done. */
void pool_run(Pool *pool, Task task, void *context, int64_t count);
int pool_threads(const Pool *pool);
/* Memory of one thread (or, slot 0 of `shared`, of the whole operation) that lasts until it is asked for again. */
void *pool_scratch(Pool *pool, int thread, size_t bytes);
void *pool_shared(Pool *pool, size_t bytes);

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- small vector helpers ---- */

INLINE float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE float sum_of_squares(const float *x, int64_t n) {
    __m256 s[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 2; j++) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            s[j] = _mm256_fmadd_ps(v, v, s[j]);
        }
    float sum = sum8(_mm256_add_ps(s[0], s[1]));
    for (; i < n; i++) sum += x[i] * x[i];
    return sum;
}

/* e^x for x <= 88, relative error below 2e-7 (Cephes' expf polynomial); 0 below -87.3; NaN stays NaN. */
INLINE __m256 exp8(__m256 x) {
    const __m256 low = _mm256_set1_ps(-87.3f);
    __m256 under = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(under, _mm256_mul_ps(p, _mm256_castsi256_ps(e)));
}

/* ---- the key/value cache, token-major: [slots, heads, width] ---- */

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

typedef struct {
    void *key, *value;
    float *key_scale, *value_scale; /* [slots, heads] of an int8 cache: key ~ integer * scale */
    int64_t heads, width;
    int64_t kind;
} Cache;

INLINE int64_t kind_bytes(int64_t kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

/* Eight values of a row of kind `kind` from element `i` on; integers are not scaled. */
INLINE __m256 load8(const void *row, int64_t i, int64_t kind) {
    switch (kind) {
    case FLOAT32: return _mm256_loadu_ps((const float *)row + i);
    case BFLOAT16: {
        __m128i v = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    case FLOAT16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + i)));
    default: return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)row + i))));
    }
}

/* ---- the operations, one file each, and what layers.c hands them ---- */

/* A matrix of integers in blocks of 16 outputs; int8.c and int4.c say how they lie. */
typedef struct {
    const void *packed;
    const void *scale; /* int8: float32, one per output; int4: of `scale_kind` [blocks, groups, BLOCK]; padded to whole blocks */
    int64_t outputs, inputs;
    int64_t segment; /* int8: inputs of one integer sum, a multiple of 2 */
    int64_t levels;  /* largest integer of an activation */
    int64_t group;   /* int4: inputs of one scale, a multiple of 2; 0 for int8 */
    const uint8_t *zero; /* int4: as `scale`, or NULL: 8 everywhere */
    int64_t scale_kind;
} Matrix;

INLINE int64_t groups_of(const Matrix *m) { return (m->inputs + m->group - 1) / m->group; }

/* Activations as integers: x ~ integer * step. */
typedef struct {
    const int16_t *integers; /* [rows, stride], zero behind the inputs */
    const float *step;       /* [rows] */
    const int32_t *sums;     /* int4: [rows, groups], of the integers of each group */
    int64_t stride;
} Rows;

#ifdef __AVX512VNNI__
#define STRIP 12 /* rows of a register tile: enough independent sums to hide the latency of vpdpwssd */
#else
#define STRIP 6 /* 12 of 16 registers hold sums */
#endif

/* Values float32 [rows, BLOCK] of one block of outputs for `rows` (at most STRIP) rows of x from `row` on. */
void int8_block(const Matrix *m, const Rows *x, int64_t block, int64_t row, int rows, float *restrict values);
void int4_block(const Matrix *m, const Rows *x, int64_t block, int64_t row, int rows, float *restrict values);
/* A row of the matrix as it was before packing, scaled: out float32 [inputs]. */
void int8_row(const Matrix *m, int64_t row, float *out);
void int4_row(const Matrix *m, int64_t row, float *out);

enum { STORE = 0, ADD = 1, GATE_UP = 2 };

typedef struct {
    const float *q, *k, *v; /* rows of heads; the strides of rows are in elements */
    int64_t q_stride, k_stride, v_stride;
    int64_t rows, query_heads;
    const float *cos, *sin;       /* [rows, width / 2] */
    const float *q_norm, *k_norm; /* [width] or NULL */
    float q_eps, k_eps;
    const int64_t *slots;
    float *q_out; /* [rows, query_heads, width] */
} Heads;

typedef struct {
    const float *q; /* [tokens, query_heads, width] */
    float *out;     /* the same */
    const int32_t *tables; /* [sequences, table_stride] page numbers */
    const int32_t *contexts, *starts;
    int64_t sequences, table_stride, page, query_heads;
    int64_t window; /* tokens a query sees, itself included; 0 for all */
    float scale;
} Queries;

void spq_linear(Pool *pool, const float *x, int64_t x_stride, int64_t rows, const float *norm, float eps,
                const Matrix *m, float *y, int64_t y_stride, int mode);
void spq_silu_mul(Pool *pool, float *gate, int64_t gate_stride, const float *up, int64_t up_stride, int64_t rows,
                  int64_t columns);
void spq_heads(Pool *pool, const Heads *heads, const Cache *cache);
void spq_attention(Pool *pool, const Queries *queries, const Cache *cache);

#endif
