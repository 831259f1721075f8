/* Int8 matrices: the product of one block of 16 outputs, how blocks lie in memory, and rows read back.
 *
 * Two products of 16 bits are added in one instruction (vpmaddwd; vpdpwssd with VNNI), which is twice the rate of float32
 * FMA without VNNI and as fast as two 8-bit digits with it. `levels` and `segment` are chosen when a matrix is packed, so
 * that no sum leaves 32 bits.
 *
 * Layout of a matrix: blocks of 16 outputs; in a block pairs of inputs; of a pair 16 outputs x 2 inputs. It is read once,
 * from front to back, by up to STRIP rows at a time.
 */
#include "native.h"

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

/* Not inlined: in a larger function gcc 12 keeps fewer sums in registers, and 16 rows x 4096 x 4096 take 1.26 times as
 * long (Zen 3, one thread: 6.8 against 5.4 ms). */
__attribute__((noinline)) static void tile_of(const int16_t *x, int64_t stride, const int8_t *w, int64_t pairs, int32_t *sums,
                                              int rows) {
    switch (rows) {
#define CASE(n) case n: tile(x, stride, w, pairs, sums, n); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if STRIP > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

void int8_block(const Matrix *m, const Rows *x, int64_t block, int64_t row, int rows, float *restrict values) {
    int32_t sums[STRIP * BLOCK];
    int64_t inputs = round_up(m->inputs, 2);
    const int8_t *w = (const int8_t *)m->packed + block * inputs * BLOCK;
    for (int64_t begin = 0; begin < inputs; begin += m->segment) {
        int64_t length = least(m->segment, inputs - begin);
        tile_of(x->integers + row * x->stride + begin, x->stride, w + begin * BLOCK, length / 2, sums, rows);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < BLOCK; i++) {
                float sum = (float)sums[r * BLOCK + i];
                values[r * BLOCK + i] = begin == 0 ? sum : values[r * BLOCK + i] + sum;
            }
    }
    const float *scale = (const float *)m->scale + block * BLOCK;
    for (int r = 0; r < rows; r++) {
        float step = x->step[row + r];
        for (int i = 0; i < BLOCK; i++) values[r * BLOCK + i] *= step * scale[i];
    }
}

void int8_row(const Matrix *m, int64_t row, float *out) {
    const int8_t *w = (const int8_t *)m->packed + row / BLOCK * round_up(m->inputs, 2) * BLOCK + row % BLOCK * 2;
    float scale = ((const float *)m->scale)[row];
    for (int64_t k = 0; k < m->inputs; k++) out[k] = (float)w[k / 2 * 2 * BLOCK + k % 2] * scale;
}

/* Lay out int8 [outputs, inputs] (rows `stride` apart) as blocks; `packed` has round_up(outputs, BLOCK) * round_up(inputs, 2)
 * bytes. `every` 2 and `first` 0 or 1 place gate and up in alternate blocks. */
void spq_pack_int8(const int8_t *weight, int64_t outputs, int64_t inputs, int64_t stride, int8_t *packed, int64_t every,
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
