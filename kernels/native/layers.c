/* The decoder layers of one step in one call: the order of the operations, and where their results go in between.
 *
 * Why one call: from Python each operation costs some ten microseconds and takes the interpreter's lock again, for which
 * it may have to wait while another thread writes answers. The operations are those of the other files.
 */
#include "native.h"

/* A map in one or two factors; `second` is NULL for one. */
typedef struct {
    const Matrix *first, *second;
} Map;

typedef struct {
    const float *input_norm, *post_norm; /* [hidden] */
    float input_eps, post_eps;
    const Matrix *projections; /* q, k and v, or their first factors, stacked */
    const Matrix *second[3];   /* second factors, or NULL */
    const float *bias[3];      /* [columns of the projection] or NULL */
    int64_t column[3];         /* where each one's part of the stacked result begins */
    const float *q_norm, *k_norm;
    float q_eps, k_eps;
    Map out, down;
    const Matrix *gate_up;
    int64_t window; /* tokens a query sees, 0 for all */
} Layer;

typedef struct {
    const Layer *layers;
    const Cache *caches; /* one per layer */
    int64_t count, hidden, query_heads;
    int64_t first, second; /* floats of the two work areas of a row: see kernels.native.program */
} Layers;

static void add_bias(float *y, int64_t stride, int64_t rows, const float *bias, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i++) y[r * stride + i] += bias[i];
}

static void add_map(Pool *pool, const Map *map, const float *x, int64_t stride, int64_t rows, float *middle, float *h) {
    if (map->second == NULL) {
        spq_linear(pool, x, stride, rows, NULL, 0, map->first, h, map->first->outputs, ADD);
        return;
    }
    int64_t rank = map->first->outputs;
    spq_linear(pool, x, stride, rows, NULL, 0, map->first, middle, rank, STORE);
    spq_linear(pool, middle, rank, rows, NULL, 0, map->second, h, map->second->outputs, ADD);
}

/* h [rows, hidden] through all layers, in place. `heads` gives cos, sin and slots of the step's tokens, `queries` their
 * sequences. `work` holds three areas, each used again as soon as what it held was read: projections, then the MLP; rotated
 * queries and the result of attention, then first factors; keys and values that come out of second factors. */
void spq_layers(Pool *pool, const Layers *all, float *h, int64_t rows, const Heads *heads, const Queries *queries, float *work) {
    int64_t width = all->caches[0].width, wide = all->query_heads * width;
    float *first = work, *second = first + rows * all->first, *third = second + rows * all->second;
    float *rotated = second, *attended = second + rows * wide;
    for (int64_t i = 0; i < all->count; i++) {
        const Layer *layer = all->layers + i;
        const Cache *cache = all->caches + i;
        int64_t stride = layer->projections->outputs, narrow = cache->heads * width;
        spq_linear(pool, h, all->hidden, rows, layer->input_norm, layer->input_eps, layer->projections, first, stride,
                   STORE);
        const float *qkv[3];
        int64_t strides[3];
        for (int j = 0; j < 3; j++) {
            float *y = first + layer->column[j];
            int64_t columns = j == 0 ? wide : narrow;
            strides[j] = stride;
            if (layer->second[j] != NULL) {
                float *product = j == 0 ? attended : third + (j - 1) * rows * narrow;
                spq_linear(pool, y, stride, rows, NULL, 0, layer->second[j], product, columns, STORE);
                y = product;
                strides[j] = columns;
            }
            if (layer->bias[j] != NULL) add_bias(y, strides[j], rows, layer->bias[j], columns);
            qkv[j] = y;
        }
        Heads transform = *heads;
        transform.q = qkv[0], transform.k = qkv[1], transform.v = qkv[2];
        transform.q_stride = strides[0], transform.k_stride = strides[1], transform.v_stride = strides[2];
        transform.q_norm = layer->q_norm, transform.k_norm = layer->k_norm;
        transform.q_eps = layer->q_eps, transform.k_eps = layer->k_eps;
        transform.q_out = rotated;
        spq_heads(pool, &transform, cache);
        Queries ask = *queries;
        ask.q = rotated, ask.out = attended, ask.window = layer->window;
        spq_attention(pool, &ask, cache);
        add_map(pool, &layer->out, attended, wide, rows, first, h);
        int64_t mlp = layer->gate_up->outputs / 2;
        spq_linear(pool, h, all->hidden, rows, layer->post_norm, layer->post_eps, layer->gate_up, first, mlp, GATE_UP);
        add_map(pool, &layer->down, first, mlp, rows, second, h);
    }
}
