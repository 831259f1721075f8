/* Causal attention over a paged cache, for decoding sequences and chunks of prompts alike.
 *
 * A task is a few key/value heads and a few queries of one sequence: all heads of one token where many sequences decode
 * (the cache is then read from front to back), one head of several tokens of a prompt. It goes over the visible tokens
 * twice: scores and softmax, then weighted values. Keys and values that are not float32 are widened TILE tokens at a
 * time; scales of an int8 cache weigh scores and probabilities instead. Sums run over tokens in order and lanes are
 * those of the token's position, so a query's result does not depend on other sequences or on how its prompt was cut.
 */
#include "native.h"

#define TILE 32 /* tokens widened at a time: 16 KiB with heads of 128 */
#define ROWS 16 /* query heads x tokens of one task of a prompt: what is widened is used as often */

typedef struct {
    int32_t sequence, head, heads, query, queries;
} Part;

typedef struct {
    Pool *pool;
    const Queries *queries;
    const Cache *cache;
    const Part *parts;
} Work;

/* Where the keys or values of one head lie for up to TILE tokens, and what kind they are. */
typedef struct {
    const void *rows[TILE];
    float scales[TILE];
    int64_t kind;
} Tile;

/* Cache slots of tokens begin .. begin + count - 1 of a sequence; entries up to TILE repeat the first: read, not used. */
static void find_slots(const Queries *q, int64_t sequence, int64_t begin, int64_t count, int64_t *slots) {
    const int32_t *pages = q->tables + sequence * q->table_stride + begin / q->page;
    int64_t offset = begin % q->page;
    for (int64_t t = 0; t < count; t++) {
        slots[t] = *pages * q->page + offset;
        if (++offset == q->page) offset = 0, pages++;
    }
    for (int64_t t = count; t < TILE; t++) slots[t] = slots[0];
}

/* Point at one head of the slots, or at copies widened to float32 where `widened` is given. */
static void load_tile(const Cache *c, const void *cache, const float *scales, int64_t head, const int64_t *slots,
                      int64_t count, float *widened, Tile *tile) {
    int64_t bytes = c->width * kind_bytes(c->kind);
    tile->kind = widened == NULL ? c->kind : FLOAT32;
    for (int64_t t = 0; t < TILE; t++) {
        int64_t index = slots[t] * c->heads + head;
        tile->rows[t] = (const char *)cache + index * bytes;
        tile->scales[t] = c->kind == INT8 ? scales[index] : 1.0f;
    }
    if (widened == NULL) return;
    for (int64_t t = 0; t < count; t++) {
        float *out = widened + t * c->width;
        switch (c->kind) {
#define WIDEN(k) case k: for (int64_t i = 0; i < c->width; i += 8) _mm256_storeu_ps(out + i, load8(tile->rows[t], i, k)); break;
            WIDEN(BFLOAT16) WIDEN(FLOAT16) WIDEN(INT8)
        }
        tile->rows[t] = out;
    }
    for (int64_t t = count; t < TILE; t++) tile->rows[t] = tile->rows[0];
}

/* Scores of one query for the tile's tokens, eight at a time. */
INLINE void score_kind(const float *q, const Tile *tile, int64_t count, int64_t width, float scale, float *out,
                       const int kind) {
    for (int64_t t = 0; t < count; t += 8) {
        __m256 s[8];
        for (int j = 0; j < 8; j++) s[j] = _mm256_setzero_ps();
        for (int64_t i = 0; i < width; i += 8) {
            __m256 v = _mm256_loadu_ps(q + i);
            for (int j = 0; j < 8; j++) s[j] = _mm256_fmadd_ps(v, load8(tile->rows[t + j], i, kind), s[j]);
        }
        __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
        __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
        __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
        sums = _mm256_mul_ps(_mm256_mul_ps(sums, _mm256_set1_ps(scale)), _mm256_loadu_ps(tile->scales + t));
        _mm256_storeu_ps(out + t, sums);
    }
}

#define BY_KIND(kind, call)                    \
    switch (kind) {                            \
    case FLOAT32: call(FLOAT32); break;        \
    case BFLOAT16: call(BFLOAT16); break;      \
    case FLOAT16: call(FLOAT16); break;        \
    default: call(INT8); break;                \
    }

static void score(const float *q, const Tile *tile, int64_t count, int64_t width, float scale, float *out) {
#define CALL(k) score_kind(q, tile, count, width, scale, out, k)
    BY_KIND(tile->kind, CALL)
#undef CALL
}

/* Turn scores [begin, end) into probabilities, in place; what lies before and after in [0, padded) becomes 0. */
static void softmax(float *scores, int64_t begin, int64_t end, int64_t padded) {
    for (int64_t t = 0; t < begin; t++) scores[t] = -INFINITY;
    for (int64_t t = end; t < padded; t++) scores[t] = -INFINITY;
    __m256 top = _mm256_set1_ps(-INFINITY), nan = _mm256_setzero_ps();
    for (int64_t t = 0; t < padded; t += 8) {
        __m256 v = _mm256_loadu_ps(scores + t);
        top = _mm256_max_ps(v, top);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    float largest = _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    if (_mm256_movemask_ps(nan)) largest = NAN;
    __m256 sum = _mm256_setzero_ps(), shift = _mm256_set1_ps(largest);
    for (int64_t t = 0; t < padded; t += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + t), shift));
        _mm256_storeu_ps(scores + t, e);
        sum = _mm256_add_ps(sum, e);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / sum8(sum));
    for (int64_t t = 0; t < padded; t += 8)
        _mm256_storeu_ps(scores + t, _mm256_mul_ps(_mm256_loadu_ps(scores + t), inverse));
}

/* out += probabilities of tokens [begin, end) of the tile x their values; `lanes` vectors of a head at a time. */
INLINE void weigh_part(const float *probabilities, const Tile *tile, int64_t begin, int64_t end, int64_t offset, float *out,
                       const int lanes, const int kind) {
    __m256 s[8];
    for (int j = 0; j < lanes; j++) s[j] = _mm256_loadu_ps(out + offset + 8 * j);
    for (int64_t t = begin; t < end; t++) {
        __m256 p = _mm256_set1_ps(probabilities[t] * tile->scales[t]);
        for (int j = 0; j < lanes; j++) s[j] = _mm256_fmadd_ps(p, load8(tile->rows[t], offset + 8 * j, kind), s[j]);
    }
    for (int j = 0; j < lanes; j++) _mm256_storeu_ps(out + offset + 8 * j, s[j]);
}

INLINE void weigh_kind(const float *probabilities, const Tile *tile, int64_t begin, int64_t end, int64_t width, float *out,
                       const int kind) {
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) weigh_part(probabilities, tile, begin, end, i, out, 8, kind);
    for (; i < width; i += 8) weigh_part(probabilities, tile, begin, end, i, out, 1, kind);
}

static void weigh(const float *probabilities, const Tile *tile, int64_t begin, int64_t end, int64_t width, float *out) {
#define CALL(k) weigh_kind(probabilities, tile, begin, end, width, out, k)
    BY_KIND(tile->kind, CALL)
#undef CALL
}

INLINE int64_t first_visible(const Queries *q, int64_t position) {
    return q->window > 0 && position + 1 > q->window ? position + 1 - q->window : 0;
}

/* Where a row of a part stands in q and out: row r of head h is query head r % group of token r / group. */
INLINE int64_t row_at(const Queries *q, const Cache *c, const Part *part, int64_t h, int64_t r) {
    int64_t group = q->query_heads / c->heads, token = q->starts[part->sequence] + part->query + r / group;
    return (token * q->query_heads + (part->head + h) * group + r % group) * c->width;
}

INLINE int64_t part_rows(const Queries *q, const Cache *c, const Part *part) {
    return part->queries * (q->query_heads / c->heads);
}

/* Position of a part's first query, and the first token that any of its queries sees, rounded down to whole tiles. */
INLINE int64_t part_position(const Queries *q, const Part *part) {
    int64_t s = part->sequence;
    return q->contexts[s] - (q->starts[s + 1] - q->starts[s]) + part->query;
}

INLINE int64_t part_low(const Queries *q, const Part *part) {
    return first_visible(q, part_position(q, part)) / TILE * TILE;
}

INLINE int64_t part_padded(const Queries *q, const Part *part) {
    return round_up(part_position(q, part) + part->queries - part_low(q, part), TILE);
}

static size_t part_bytes(const Queries *q, const Cache *c, const Part *part) {
    return sizeof(float) * (TILE * c->width + part->heads * part_rows(q, c, part) * part_padded(q, part));
}

static void attention_task(void *context, int64_t task, int thread) {
    const Work *work = context;
    const Queries *q = work->queries;
    const Cache *c = work->cache;
    const Part *part = work->parts + task;
    int64_t group = q->query_heads / c->heads, width = c->width, rows = part_rows(q, c, part);
    int64_t position = part_position(q, part), low = part_low(q, part), high = position + part->queries;
    int64_t padded = part_padded(q, part);
    float *memory = pool_scratch(work->pool, thread, part_bytes(q, c, part));
    float *scores = memory + TILE * width; /* [heads, rows, padded] */
    float *widened = c->kind == FLOAT32 || rows == 1 ? NULL : memory; /* worth it where more than one row reads it */
    int64_t slots[TILE];
    Tile tile;
    for (int64_t begin = low; begin < high; begin += TILE) {
        int64_t count = least(TILE, high - begin);
        find_slots(q, part->sequence, begin, count, slots);
        for (int64_t h = 0; h < part->heads; h++) {
            load_tile(c, c->key, c->key_scale, part->head + h, slots, count, widened, &tile);
            for (int64_t r = 0; r < rows; r++)
                if (begin <= position + r / group)
                    score(q->q + row_at(q, c, part, h, r), &tile, count, width, q->scale,
                          scores + (h * rows + r) * padded + begin - low);
        }
    }
    for (int64_t h = 0; h < part->heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = position + r / group;
            softmax(scores + (h * rows + r) * padded, first_visible(q, at) - low, at + 1 - low, padded);
            memset(q->out + row_at(q, c, part, h, r), 0, width * sizeof(float));
        }
    for (int64_t begin = low; begin < high; begin += TILE) {
        int64_t count = least(TILE, high - begin);
        find_slots(q, part->sequence, begin, count, slots);
        for (int64_t h = 0; h < part->heads; h++) {
            load_tile(c, c->value, c->value_scale, part->head + h, slots, count, widened, &tile);
            for (int64_t r = 0; r < rows; r++) {
                int64_t at = position + r / group, from = first_visible(q, at) - begin;
                weigh(scores + (h * rows + r) * padded + begin - low, &tile, from > 0 ? from : 0,
                      least(count, at + 1 - begin), width, q->out + row_at(q, c, part, h, r));
            }
        }
    }
}

/* Attention of q over what the cache holds of each sequence, the tokens of this step included. The width of a head is a
 * multiple of 8. */
void spq_attention(Pool *pool, const Queries *q, const Cache *c) {
    int64_t threads = pool_threads(pool), heads = c->heads, tokens = q->starts[q->sequences];
    int64_t queries = ROWS * c->heads / q->query_heads;
    if (queries < 1) queries = 1;
    /* few sequences that decode share the threads head by head */
    int64_t split = q->sequences >= 2 * threads ? 1 : least(heads, (2 * threads + q->sequences - 1) / q->sequences);
    int64_t decode_heads = (heads + split - 1) / split;
    Part *parts = pool_shared(pool, sizeof(Part) * tokens * heads);
    int64_t count = 0;
    for (int64_t s = 0; s < q->sequences; s++) {
        int64_t length = q->starts[s + 1] - q->starts[s];
        int64_t step = length == 1 ? decode_heads : 1;
        for (int64_t i = 0; i < length; i += queries)
            for (int64_t h = 0; h < heads; h += step)
                parts[count++] = (Part){s, h, least(step, heads - h), i, least(queries, length - i)};
    }
    Work work = {pool, q, c, parts};
    pool_run(pool, attention_task, &work, count);
}
