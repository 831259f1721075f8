/* The decoder layers of one step in one call: the order of the operations, and where their results go in between.
 *
 * Why one call: from Python each operation costs some ten microseconds and takes the interpreter's lock again, for which
 * it may have to wait while another thread writes answers. The operations are those of the other files.
 */
#include "native.h"

#define MOST_FIRSTS 6 /* three projections, each with a correction, and nothing of one kind */

/* One projection: the sum of one or two terms, each of them columns of a first matrix's product, perhaps times a second
 * factor, and a bias. */
typedef struct {
    int64_t first[2];  /* index of the first matrix; -1 where there is no second term */
    int64_t column[2]; /* where in its product the term's part begins */
    const Matrix *second[2]; /* or NULL; the second term has one */
    const float *bias;       /* [columns] or NULL */
    int64_t columns;
} Output;

/* Projections of one input; the C side of kernels.cpu_linear.Joint. */
typedef struct {
    const Matrix *firsts[MOST_FIRSTS];
    int64_t num_firsts;
    Output outputs[3];
    int64_t num_outputs;
} Joint;

typedef struct {
    const float *input_norm, *post_norm; /* [hidden] */
    float input_eps, post_eps;
    Joint qkv, out, down;
    const Matrix *gate_up; /* gate and up in alternate blocks; NULL: `apart` has them */
    Joint apart;
    const float *q_norm, *k_norm;
    float q_eps, k_eps;
    int64_t window; /* tokens a query sees, 0 for all */
} Layer;

typedef struct {
    const Layer *layers;
    const Cache *caches; /* one per layer */
    int64_t count, hidden, query_heads;
    int64_t products, seconds; /* floats of the first two work areas of a row: see kernels.native.program */
} Layers;

/* Rows of one projection. */
typedef struct {
    float *values;
    int64_t stride;
} View;

static void add_bias(View y, int64_t rows, const float *bias, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i++) y.values[r * y.stride + i] += bias[i];
}

/* All projections of n = x or, with `norm`, x / rms(x) * norm. The products of first matrices go to `products`, what comes
 * out of second factors to `seconds`. */
static void apply(Pool *pool, const Joint *joint, const float *x, int64_t stride, int64_t rows, const float *norm, float eps,
                  float *products, float *seconds, View *y) {
    View product[MOST_FIRSTS];
    for (int64_t i = 0; i < joint->num_firsts; i++) {
        const Matrix *m = joint->firsts[i];
        product[i] = (View){products, m->outputs};
        products += rows * m->outputs;
        spq_linear(pool, x, stride, rows, norm, eps, m, product[i].values, m->outputs, STORE);
    }
    for (int64_t i = 0; i < joint->num_outputs; i++) {
        const Output *output = joint->outputs + i;
        View part = product[output->first[0]];
        part.values += output->column[0];
        y[i] = part;
        if (output->second[0] != NULL) {
            y[i] = (View){seconds, output->columns};
            seconds += rows * output->columns;
            spq_linear(pool, part.values, part.stride, rows, NULL, 0, output->second[0], y[i].values, y[i].stride, STORE);
        }
        if (output->first[1] >= 0) {
            part = product[output->first[1]];
            spq_linear(pool, part.values + output->column[1], part.stride, rows, NULL, 0, output->second[1], y[i].values,
                       y[i].stride, ADD);
        }
        if (output->bias != NULL) add_bias(y[i], rows, output->bias, output->columns);
    }
}

/* h += the one projection of x; first factors go to `middle`. */
static void add(Pool *pool, const Joint *joint, View x, int64_t rows, float *middle, float *h) {
    const Output *output = joint->outputs;
    for (int term = 0; term < 2 && output->first[term] >= 0; term++) {
        const Matrix *first = joint->firsts[output->first[term]], *second = output->second[term];
        if (second == NULL) {
            spq_linear(pool, x.values, x.stride, rows, NULL, 0, first, h, output->columns, ADD);
            continue;
        }
        spq_linear(pool, x.values, x.stride, rows, NULL, 0, first, middle, first->outputs, STORE);
        spq_linear(pool, middle, first->outputs, rows, NULL, 0, second, h, output->columns, ADD);
    }
    if (output->bias != NULL) add_bias((View){h, output->columns}, rows, output->bias, output->columns);
}

/* silu(gate) * up of the normed h. */
static View mlp_input(Pool *pool, const Layer *layer, const float *h, int64_t hidden, int64_t rows, float *products,
                      float *seconds) {
    if (layer->gate_up != NULL) {
        View y = {products, layer->gate_up->outputs / 2};
        spq_linear(pool, h, hidden, rows, layer->post_norm, layer->post_eps, layer->gate_up, y.values, y.stride, GATE_UP);
        return y;
    }
    View y[2];
    apply(pool, &layer->apart, h, hidden, rows, layer->post_norm, layer->post_eps, products, seconds, y);
    spq_silu_mul(pool, y[0].values, y[0].stride, y[1].values, y[1].stride, rows, layer->apart.outputs[0].columns);
    return y[0];
}

/* h [rows, hidden] through all layers, in place. `heads` gives cos, sin and slots of the step's tokens, `queries` their
 * sequences. `work` holds three areas, each used again as soon as what it held was read: products of first matrices; what
 * comes out of second factors; rotated queries and the result of attention, then the inner side of the down projection. */
void spq_layers(Pool *pool, const Layers *all, float *h, int64_t rows, const Heads *heads, const Queries *queries, float *work) {
    int64_t wide = all->query_heads * all->caches[0].width;
    float *products = work, *seconds = products + rows * all->products, *rotated = seconds + rows * all->seconds;
    float *attended = rotated + rows * wide;
    for (int64_t i = 0; i < all->count; i++) {
        const Layer *layer = all->layers + i;
        const Cache *cache = all->caches + i;
        View qkv[3];
        apply(pool, &layer->qkv, h, all->hidden, rows, layer->input_norm, layer->input_eps, products, seconds, qkv);
        Heads transform = *heads;
        transform.q = qkv[0].values, transform.k = qkv[1].values, transform.v = qkv[2].values;
        transform.q_stride = qkv[0].stride, transform.k_stride = qkv[1].stride, transform.v_stride = qkv[2].stride;
        transform.q_norm = layer->q_norm, transform.k_norm = layer->k_norm;
        transform.q_eps = layer->q_eps, transform.k_eps = layer->k_eps;
        transform.q_out = rotated;
        spq_heads(pool, &transform, cache);
        Queries ask = *queries;
        ask.q = rotated, ask.out = attended, ask.window = layer->window;
        spq_attention(pool, &ask, cache);
        add(pool, &layer->out, (View){attended, wide}, rows, products, h);
        View inner = mlp_input(pool, layer, h, all->hidden, rows, products, seconds);
        add(pool, &layer->down, inner, rows, rotated, h);
    }
}
