/* Int4 matrices with a scale, and perhaps a zero point, for each group of inputs: y = sum over groups of
 * scale * (sum of x q - zero * sum of x).
 *
 * Both sums are of integers and exact: `levels` is small enough for 15 * levels * group to fit 32 bits. Then one product
 * and one addition in float32 for each group; rows do not depend on each other. The sums of x are made once per step, so
 * the inner loop multiplies the unsigned q as it is stored.
 *
 * Layout of a matrix: blocks of 16 outputs; in a block the groups in order; in a group quads of 4 inputs, the last one
 * filled up with 0; of a quad 16 words of 16 bits, word 2 i + c with the halves, from the low one: output i input c, output
 * i + 8 input c, output i input c + 2, output i + 8 input c + 2. Shifts by 0, 4, 8 and 12 give four operands of vpmaddwd.
 */
#include "native.h"

#define QUAD 32 /* bytes of 4 inputs of a block */

INLINE int64_t quads_of(int64_t inputs) { return (inputs + 3) / 4; }

INLINE int64_t block_bytes(const Matrix *m) {
    return QUAD * (m->inputs / m->group * quads_of(m->group) + quads_of(m->inputs % m->group));
}

INLINE __m256i zeros8(const Matrix *m, int64_t at) {
    if (m->zero == NULL) return _mm256_set1_epi32(8);
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(m->zero + at)));
}

/* Sums of `rows` rows over `quads` quads of one group of one block. */
INLINE void tile(const int16_t *x, int64_t stride, const uint8_t *w, int64_t quads, int32_t *sums, const int rows) {
#ifdef __AVX512VNNI__
    const __m512i low = _mm512_set1_epi16(15);
    __m512i s[STRIP];
    for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_si512();
    for (int64_t p = 0; p < quads; p++, w += QUAD) {
        __m256i v = _mm256_loadu_si256((const __m256i *)w);
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(v), _mm256_srli_epi16(v, 4), 1);
        __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 8), low);
        for (int r = 0; r < rows; r++) {
            int32_t pair[2];
            memcpy(pair, x + r * stride + 4 * p, 8);
            s[r] = _mm512_dpwssd_epi32(s[r], first, _mm512_set1_epi32(pair[0]));
            s[r] = _mm512_dpwssd_epi32(s[r], second, _mm512_set1_epi32(pair[1]));
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(sums + r * BLOCK, s[r]);
#else /* named sums, because gcc 12 spills an array of them */
    const __m256i low = _mm256_set1_epi16(15);
    __m256i s00, s01, s10, s11, s20, s21, s30, s31, s40, s41, s50, s51;
    s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = s40 = s41 = s50 = s51 = _mm256_setzero_si256();
    for (int64_t p = 0; p < quads; p++, w += QUAD, x += 4) {
        __m256i v = _mm256_loadu_si256((const __m256i *)w);
        __m256i q0 = _mm256_and_si256(v, low), q1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
#define ROW(r, c)                                                         \
    if (rows > r) {                                                       \
        int32_t pair;                                                     \
        memcpy(&pair, x + r * stride + c, 4);                             \
        __m256i a = _mm256_set1_epi32(pair);                              \
        s##r##0 = _mm256_add_epi32(s##r##0, _mm256_madd_epi16(a, q0));    \
        s##r##1 = _mm256_add_epi32(s##r##1, _mm256_madd_epi16(a, q1));    \
    }
        ROW(0, 0) ROW(1, 0) ROW(2, 0) ROW(3, 0) ROW(4, 0) ROW(5, 0)
        q0 = _mm256_and_si256(_mm256_srli_epi16(v, 8), low), q1 = _mm256_srli_epi16(v, 12);
        ROW(0, 2) ROW(1, 2) ROW(2, 2) ROW(3, 2) ROW(4, 2) ROW(5, 2)
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

/* Not inlined, as in int8.c. */
__attribute__((noinline)) static void tile_of(const int16_t *x, int64_t stride, const uint8_t *w, int64_t quads, int32_t *sums,
                                              int rows) {
    switch (rows) {
#define CASE(n) case n: tile(x, stride, w, quads, sums, n); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if STRIP > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

void int4_block(const Matrix *m, const Rows *x, int64_t block, int64_t row, int rows, float *restrict values) {
    int32_t sums[STRIP * BLOCK];
    int64_t groups = groups_of(m);
    const int16_t *integers = x->integers + row * x->stride;
    const uint8_t *w = (const uint8_t *)m->packed + block * block_bytes(m);
    memset(values, 0, rows * BLOCK * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        int64_t begin = g * m->group, quads = quads_of(least(m->group, m->inputs - begin));
        tile_of(integers + begin, x->stride, w, quads, sums, rows);
        w += quads * QUAD;
        for (int half = 0; half < BLOCK; half += 8) {
            int64_t at = (block * groups + g) * BLOCK + half;
            __m256i zero = zeros8(m, at);
            __m256 scale = load8(m->scale, at, m->scale_kind);
            for (int r = 0; r < rows; r++) {
                __m256i total = _mm256_set1_epi32(x->sums[(row + r) * groups + g]);
                __m256i sum = _mm256_loadu_si256((const __m256i *)(sums + r * BLOCK + half));
                __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, total)));
                float *y = values + r * BLOCK + half;
                _mm256_storeu_ps(y, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(y)));
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float step = x->step[row + r];
        for (int i = 0; i < BLOCK; i++) values[r * BLOCK + i] *= step;
    }
}

void int4_row(const Matrix *m, int64_t row, float *out) {
    int64_t block = row / BLOCK, lane = row % BLOCK, groups = groups_of(m);
    const uint16_t *quad = (const uint16_t *)((const uint8_t *)m->packed + block * block_bytes(m)) + 2 * (lane % 8);
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = (block * groups + g) * BLOCK + lane, end = least((g + 1) * m->group, m->inputs);
        int zero = m->zero == NULL ? 8 : m->zero[at];
        float scale = m->scale_kind == FLOAT16 ? _cvtsh_ss(((const uint16_t *)m->scale)[at]) : ((const float *)m->scale)[at];
        for (int64_t k = g * m->group; k < end; k += 4, quad += QUAD / 2)
            for (int64_t c = 0; c < least(4, end - k); c++)
                out[k + c] = (float)((quad[c % 2] >> (8 * (c / 2) + 4 * (lane / 8)) & 15) - zero) * scale;
    }
}

/* What is packed: halves [outputs, ceil(inputs / 2)], an even input in the low one. */
typedef struct {
    const uint8_t *halves;
    int64_t outputs, stride;
} Stored;

INLINE int half_of(const Stored *s, int64_t row, int64_t k, int64_t end) {
    return row < s->outputs && k < end ? s->halves[row * s->stride + k / 2] >> k % 2 * 4 & 15 : 0;
}

/* Lay out `halves` as blocks of `m`, of which inputs and group are read. `every` 2 and `first` 0 or 1 place gate and up in
 * alternate blocks. */
void spq_pack_int4(const Matrix *m, const uint8_t *halves, int64_t outputs, uint8_t *packed, int64_t every, int64_t first) {
    Stored stored = {halves, outputs, (m->inputs + 1) / 2};
    for (int64_t b = 0; b * BLOCK < outputs; b++) {
        uint16_t *quad = (uint16_t *)(packed + (b * every + first) * block_bytes(m));
        for (int64_t begin = 0; begin < m->inputs; begin += m->group) {
            int64_t end = least(begin + m->group, m->inputs);
            for (int64_t k = begin; k < end; k += 4, quad += QUAD / 2)
                for (int64_t word = 0; word < 16; word++) {
                    int64_t row = b * BLOCK + word / 2, input = k + word % 2;
                    quad[word] = (uint16_t)(half_of(&stored, row, input, end) | half_of(&stored, row + 8, input, end) << 4 |
                                            half_of(&stored, row, input + 2, end) << 8 |
                                            half_of(&stored, row + 8, input + 2, end) << 12);
                }
        }
    }
}

/* Bytes of `packed` for one block. */
int64_t spq_int4_block_bytes(const Matrix *m) { return block_bytes(m); }
