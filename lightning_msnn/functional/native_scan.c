/* The scans over windows on a CPU: one pass over the map forward, one backward.
 *
 * native_scan.py compiles and calls this file; fused.py and eager_scan.py say what is computed. Maps lie in
 * channels-last order, float32 or bfloat16; membranes are float32 while they travel. An image and a range of channels
 * is a task of its own. Gradients of decays and thetas are returned by image and channel, so that they depend neither
 * on the number of threads nor on which of them is first.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define PI 3.14159265358979323846f

enum { SINE, MEAN, TANH, EXPONENTIAL, POLYNOMIAL, PIECEWISE_LINEAR, NONE, FIRST_LAYER };

/* Sizes and strides in elements, in the order in which Python writes them. */
typedef struct {
    int64_t B, C, H, W, h, w;          /* images, channels, the map, a window */
    int64_t batch, row, column;        /* strides of the map */
    int64_t down, right;               /* from a place of a window to the next below and beside it */
    int64_t offset[4];                 /* from the first window to each */
    int64_t slot, slot_batch;          /* strides of the windows' own membranes, where windows overlap */
    int64_t overlap, threads, block;   /* channels of a task */
} Geometry;

/* What a call works on; where windows do not overlap, membranes lie on the map. */
typedef struct {
    Geometry g;
    const void *current;    /* of a backward pass: the gradient of the merged membranes */
    const void *first;      /* membranes of layer 1, where layer 2 is scanned */
    const void *owed;       /* gradient of the windows' own membranes of layer 1 */
    void *windows;          /* the windows' own membranes, of the first three where they overlap */
    void *merged;           /* merged membranes; of a backward pass: the gradient of the current */
    void *by_first;         /* gradient of layer 1's membranes */
    const float *tau;       /* by channel */
    const float *theta;     /* one number */
    float *by_tau, *by_theta; /* gradients by image and channel, which begin as zeros */
} Call;

typedef union { float f; uint32_t u; } Bits;

INLINE float load(const void *p, int64_t i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    Bits x;
    x.u = (uint32_t)((const uint16_t *)p)[i] << 16;
    return x.f;
}

INLINE void store(void *p, int64_t i, float value, int bf16) {
    if (!bf16) {
        ((float *)p)[i] = value;
        return;
    }
    Bits x;
    x.f = value;
    uint32_t nearest = (x.u + 0x7fffu + ((x.u >> 16) & 1u)) >> 16; /* ties to even */
    ((uint16_t *)p)[i] = (uint16_t)(value != value ? 0x7fc0u : nearest);
}

/* The sine on [-pi/2, pi/2]: the power series, whose error there is that of float32. */
INLINE float sine_series(float r) {
    r = r > 1.6f ? 1.6f : r; /* beyond the precision of a huge argument; NaN stays */
    r = r < -1.6f ? -1.6f : r;
    float z = r * r, s = -1.0f / 39916800.0f;
    s = fmaf(s, z, 1.0f / 362880.0f);
    s = fmaf(s, z, -1.0f / 5040.0f);
    s = fmaf(s, z, 1.0f / 120.0f);
    s = fmaf(s, z, -1.0f / 6.0f);
    return fmaf(s * z, r, r);
}

/* x less n half turns, n a multiple of 1/2. */
INLINE float reduced(float x, float n) { return fmaf(n, 8.74227800037248566e-8f, fmaf(n, -PI, x)); }

INLINE float odd(float n) { return n - 2.0f * floorf(n * 0.5f); }

INLINE float sine_of(float x) {
    float n = rintf(x * (1.0f / PI));
    return (1.0f - 2.0f * odd(n)) * sine_series(reduced(x, n));
}

INLINE float cosine_of(float x) {
    float n = rintf(fmaf(x, 1.0f / PI, -0.5f));
    return (2.0f * odd(n) - 1.0f) * sine_series(reduced(x, n + 0.5f));
}

/* Both at once: quarter turns, then the power series on [-pi/4, pi/4]. */
INLINE void sine_and_cosine(float x, float *sine, float *cosine) {
    float turns = rintf(x * 0.63661977236758134f);
    float r = fmaf(turns, -1.57079637050628662f, x);
    r = fmaf(turns, 4.37113900018624283e-8f, r);
    r = r > 0.8f ? 0.8f : r; /* beyond the precision of a huge x; NaN stays */
    r = r < -0.8f ? -0.8f : r;
    float z = r * r;
    float s = 1.0f / 362880.0f, c = -1.0f / 3628800.0f;
    s = fmaf(s, z, -1.0f / 5040.0f);
    s = fmaf(s, z, 1.0f / 120.0f);
    s = fmaf(s, z, -1.0f / 6.0f);
    s = fmaf(s * z, r, r);
    c = fmaf(c, z, 1.0f / 40320.0f);
    c = fmaf(c, z, -1.0f / 720.0f);
    c = fmaf(c, z, 1.0f / 24.0f);
    c = fmaf(c, z, -0.5f);
    c = fmaf(c, z, 1.0f);
    float swap = odd(turns), sign = 1.0f - 2.0f * odd(floorf(turns * 0.5f));
    *sine = sign * (swap != 0.0f ? c : s);
    *cosine = sign * (swap != 0.0f ? -s : c);
}

/* exp(x) for x <= 0: powers of two, then the power series on [-ln 2 / 2, ln 2 / 2]. */
INLINE float exponential_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = fmaf(n, -0.693147182464599609f, x);
    r = fmaf(n, 1.90465429995776804e-9f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    Bits two;
    two.u = (uint32_t)(127 + (int32_t)(n == n ? n : 0.0f)) << 23;
    return p * two.f;
}

typedef struct { float value, by_a, by_b, by_c; } Omega;

/* What a window hands to the next, before the decay, and its derivatives by a, by b and by c = pi theta. */
INLINE Omega omega(int kind, float a, float b, float c) {
    Omega o = {b, 0.0f, 1.0f, 0.0f}; /* none, and the first layer */
    if (kind == SINE) {
        float s, k, outer;
        sine_and_cosine(b * c, &s, &k);
        sine_and_cosine(a * c * k, &o.value, &outer);
        o.value *= 2.0f;
        outer *= 2.0f;
        o.by_a = outer * c * k;
        o.by_b = -outer * a * c * c * s;
        o.by_c = outer * a * (k - b * c * s);
    } else if (kind == MEAN) {
        o.value = 0.5f * (a + b);
        o.by_a = o.by_b = 0.5f;
    } else if (kind == TANH) {
        float x = c * (a + b), e = exponential_of(x < 0.0f ? x : -x);
        float t = (1.0f - e) / (1.0f + e);
        t = x < 0.0f ? -t : t;
        o.value = 2.0f * t;
        o.by_a = o.by_b = c * (1.0f - t * t);
        o.by_c = (a + b) * (1.0f - t * t);
    } else if (kind == EXPONENTIAL) {
        float x = 0.5f * (a + b), fade = exponential_of(x < 0.0f ? c * x : -c * x);
        o.value = (x < 0.0f ? -2.0f : 2.0f) * (1.0f - fade);
        o.by_a = o.by_b = x == 0.0f ? 0.0f : c * fade;
        o.by_c = 2.0f * x * fade;
    } else if (kind == POLYNOMIAL) {
        float y = 0.5f * c * (a + b);
        y = y > 1.0f ? 1.0f : y;
        y = y < -1.0f ? -1.0f : y;
        o.value = y * (3.0f - y * y);
        o.by_a = o.by_b = 1.5f * c * (1.0f - y * y);
        o.by_c = 1.5f * (a + b) * (1.0f - y * y);
    } else if (kind == PIECEWISE_LINEAR) {
        float z = c * (a + b), inside = z > 2.0f || z < -2.0f ? 0.0f : 1.0f;
        o.value = z > 2.0f ? 2.0f : z;
        o.value = o.value < -2.0f ? -2.0f : o.value;
        o.by_a = o.by_b = inside * c;
        o.by_c = inside * (a + b);
    }
    return o;
}

/* The value alone. */
INLINE float value_of(int kind, float a, float b, float c) {
    return kind == SINE ? 2.0f * sine_of(a * c * cosine_of(b * c)) : omega(kind, a, b, c).value;
}

/* Copy channels c0 to c1 of image b between the map and its sums in float32. */
INLINE void read_map(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum, int bf16) {
    const Geometry *g = &o->g;
    for (int64_t y = 0; y < g->H; y++)
        for (int64_t x = 0; x < g->W; x++) {
            int64_t place = b * g->batch + y * g->row + x * g->column;
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) sum[(y * g->W + x) * (c1 - c0) + c - c0] = load(o->current, place + c, bf16);
        }
}

INLINE void write_map(const Call *o, int64_t b, int64_t c0, int64_t c1, const float *sum, int bf16) {
    const Geometry *g = &o->g;
    for (int64_t y = 0; y < g->H; y++)
        for (int64_t x = 0; x < g->W; x++) {
            int64_t place = b * g->batch + y * g->row + x * g->column;
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) store(o->merged, place + c, sum[(y * g->W + x) * (c1 - c0) + c - c0], bf16);
        }
}

/* Row i and column j of each window: its place on the map, which is returned for the first one, and that of its membrane;
 * where windows overlap, also its pixel, and one over the number of windows that cover it. */
INLINE int64_t locate(
    const Geometry *g, int64_t b, int64_t i, int64_t j, int overlap, int64_t own[4], int64_t pixel[4], float share[4]
) {
    int64_t place = b * g->batch + i * g->down + j * g->right;
    for (int k = 0; k < 4; k++) {
        own[k] = overlap ? b * g->slot_batch + (i * g->w + j) * g->C + k * g->slot : place + g->offset[k];
        if (!overlap) continue;
        int64_t y = i + (k / 2) * (g->H - g->h), x = j + (k % 2) * (g->W - g->w);
        int rows = (y < g->h) + (y >= g->H - g->h), columns = (x < g->w) + (x >= g->W - g->w);
        pixel[k] = y * g->W + x;
        share[k] = 1.0f / (float)(rows * columns);
    }
    return place;
}

/* Visit the windows of channels c0 to c1 of image b. The steps are written out, for compilers give up on inner loops. */
#define STEP(k)                                                                                                        \
    {                                                                                                                  \
        float a = kind == FIRST_LAYER ? 0.0f : load(first, own[k - 1] + c, bf16);                                      \
        float carried = tau[c] * value_of(kind, a, u, angle);                                                          \
        if (overlap) sum[pixel[k] * (c1 - c0) + c - c0] += share[k] * carried;                                         \
        u = load(current, place + g->offset[k] + c, bf16) + carried;                                                   \
        if (!overlap || k < 3) store(windows, own[k] + c, u, bf16);                                                    \
    }

INLINE void forward(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum, int kind, int overlap, int bf16) {
    const Geometry *g = &o->g;
    const void *current = o->current, *first = o->first;
    void *windows = o->windows;
    const float *tau = o->tau, angle = kind == FIRST_LAYER ? 0.0f : PI * *o->theta;
    if (overlap) read_map(o, b, c0, c1, sum, bf16);
    for (int64_t i = 0; i < g->h; i++)
        for (int64_t j = 0; j < g->w; j++) {
            int64_t own[4], pixel[4];
            float share[4];
            int64_t place = locate(g, b, i, j, overlap, own, pixel, share);
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) {
                float u = load(current, place + c, bf16);
                store(windows, own[0] + c, u, bf16);
                STEP(1)
                STEP(2)
                STEP(3)
            }
        }
    if (overlap) write_map(o, b, c0, c1, sum, bf16);
}

#undef STEP
#define STEP(k)                                                                                                        \
    {                                                                                                                  \
        float a = kind == FIRST_LAYER ? 0.0f : load(first, own[k] + c, bf16);                                          \
        Omega w = omega(kind, a, load(windows, own[k] + c, bf16), angle);                                              \
        float here = load(grad, place + g->offset[k] + c, bf16), owed = tau[c] * d;                                    \
        tau_sum += d * w.value;                                                                                        \
        if (kind != FIRST_LAYER) {                                                                                     \
            theta_sum += owed * w.by_c;                                                                                \
            store(by_first, own[k] + c, owed * w.by_a, bf16);                                                          \
            owed *= w.by_b;                                                                                            \
        } else if (overlap) {                                                                                          \
            owed += load(owed_too, own[k] + c, bf16);                                                                  \
        }                                                                                                              \
        d = owed + (overlap ? share[k] * here : here);                                                                 \
        if (overlap)                                                                                                   \
            sum[pixel[k] * (c1 - c0) + c - c0] += owed;                                                                \
        else                                                                                                           \
            store(by_current, own[k] + c, d, bf16);                                                                    \
    }

INLINE void backward(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum, int kind, int overlap, int bf16) {
    const Geometry *g = &o->g;
    const void *grad = o->current, *first = o->first, *windows = o->windows, *owed_too = o->owed;
    void *by_current = o->merged, *by_first = o->by_first;
    const float *tau = o->tau, angle = kind == FIRST_LAYER ? 0.0f : PI * *o->theta;
    float *by_tau = o->by_tau + b * g->C, *by_theta = o->by_theta + b * g->C;
    if (overlap) read_map(o, b, c0, c1, sum, bf16);
    for (int64_t i = 0; i < g->h; i++)
        for (int64_t j = 0; j < g->w; j++) {
            int64_t own[4], pixel[4];
            float share[4];
            int64_t place = locate(g, b, i, j, overlap, own, pixel, share);
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) {
                /* The gradient of the membrane of the window that comes next. */
                float d = load(grad, place + g->offset[3] + c, bf16), tau_sum = 0.0f, theta_sum = 0.0f;
                if (overlap) d *= share[3];
                if (!overlap) store(by_current, own[3] + c, d, bf16);
                if (!overlap && kind != FIRST_LAYER) store(by_first, own[3] + c, 0.0f, bf16);
                STEP(2)
                STEP(1)
                STEP(0)
                by_tau[c] += tau_sum;
                if (kind != FIRST_LAYER) by_theta[c] += theta_sum;
            }
        }
    if (overlap) write_map(o, b, c0, c1, sum, bf16);
}

/* A membrane map that travels from block to block: first holds its windows, windows the new ones, all by batch. */
#undef STEP
#define STEP(k, A, B) store(windows, own[k] + c, u##k = load(current, own[k] + c, bf16) + tau[c] * value_of(kind, A, B, angle), bf16)

INLINE void recur(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum, int kind, int overlap, int bf16) {
    (void)sum, (void)overlap;
    const Geometry *g = &o->g;
    const void *current = o->current, *first = o->first;
    void *windows = o->windows;
    const float *tau = o->tau, angle = PI * *o->theta;
    for (int64_t i = 0; i < g->h; i++)
        for (int64_t j = 0; j < g->w; j++) {
            int64_t own[4];
            locate(g, b, i, j, 0, own, NULL, NULL);
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) {
                float m0 = load(first, own[0] + c, bf16), m1 = load(first, own[1] + c, bf16), u0, u1, u2, u3;
                float m2 = load(first, own[2] + c, bf16), m3 = load(first, own[3] + c, bf16);
                STEP(0, m0, m1);
                STEP(1, u0, m1);
                STEP(2, m2, u1);
                STEP(3, m3, u2);
                (void)u3;
            }
        }
}

/* What membrane k owes to both arguments of its projection, (A, B). */
#undef STEP
#define STEP(k, A, B, TO_A, TO_B)                                                                                      \
    {                                                                                                                  \
        Omega w = omega(kind, A, B, angle);                                                                            \
        float owed = tau[c] * d##k;                                                                                    \
        tau_sum += d##k * w.value;                                                                                     \
        theta_sum += owed * w.by_c;                                                                                    \
        TO_A += owed * w.by_a;                                                                                         \
        TO_B += owed * w.by_b;                                                                                         \
    }

INLINE void recur_back(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum, int kind, int overlap, int bf16) {
    (void)sum, (void)overlap;
    const Geometry *g = &o->g;
    const void *grad = o->current, *first = o->first, *windows = o->windows;
    void *by_current = o->merged, *by_first = o->by_first;
    const float *tau = o->tau, angle = PI * *o->theta;
    float *by_tau = o->by_tau + b * g->C, *by_theta = o->by_theta + b * g->C;
    for (int64_t i = 0; i < g->h; i++)
        for (int64_t j = 0; j < g->w; j++) {
            int64_t own[4];
            locate(g, b, i, j, 0, own, NULL, NULL);
#pragma omp simd
            for (int64_t c = c0; c < c1; c++) {
                float m0 = load(first, own[0] + c, bf16), m1 = load(first, own[1] + c, bf16);
                float m2 = load(first, own[2] + c, bf16), m3 = load(first, own[3] + c, bf16);
                float u0 = load(windows, own[0] + c, bf16), u1 = load(windows, own[1] + c, bf16);
                float u2 = load(windows, own[2] + c, bf16), tau_sum = 0.0f, theta_sum = 0.0f;
                float d0 = load(grad, own[0] + c, bf16), d1 = load(grad, own[1] + c, bf16);
                float d2 = load(grad, own[2] + c, bf16), d3 = load(grad, own[3] + c, bf16);
                float by0 = 0.0f, by1 = 0.0f, by2 = 0.0f, by3 = 0.0f;
                STEP(3, m3, u2, by3, d2)
                STEP(2, m2, u1, by2, d1)
                STEP(1, u0, m1, d0, by1)
                STEP(0, m0, m1, by0, by1)
                store(by_current, own[0] + c, d0, bf16);
                store(by_current, own[1] + c, d1, bf16);
                store(by_current, own[2] + c, d2, bf16);
                store(by_current, own[3] + c, d3, bf16);
                store(by_first, own[0] + c, by0, bf16);
                store(by_first, own[1] + c, by1, bf16);
                store(by_first, own[2] + c, by2, bf16);
                store(by_first, own[3] + c, by3, bf16);
                by_tau[c] += tau_sum;
                by_theta[c] += theta_sum;
            }
        }
}

typedef void Task(const Call *, int64_t b, int64_t c0, int64_t c1, float *sum);

#define TASK(PASS, KIND, OVERLAP, BF16)                                                                                \
    static void PASS##_##KIND##_##OVERLAP##_##BF16(const Call *o, int64_t b, int64_t c0, int64_t c1, float *sum) {     \
        PASS(o, b, c0, c1, sum, KIND, OVERLAP, BF16);                                                                  \
    }
#define PARTITION(PASS, KIND) TASK(PASS, KIND, 0, 0) TASK(PASS, KIND, 0, 1)
#define EITHER(PASS, KIND) PARTITION(PASS, KIND) TASK(PASS, KIND, 1, 0) TASK(PASS, KIND, 1, 1)
#define ROW(PASS, KIND) {PASS##_##KIND##_0_0, PASS##_##KIND##_0_1},
#define ROWS(PASS, KIND) {ROW(PASS, KIND){PASS##_##KIND##_1_0, PASS##_##KIND##_1_1}},
#define FOR_EACH_OMEGA(DO, PASS)                                                                                       \
    DO(PASS, SINE) DO(PASS, MEAN) DO(PASS, TANH) DO(PASS, EXPONENTIAL) DO(PASS, POLYNOMIAL) DO(PASS, PIECEWISE_LINEAR) \
    DO(PASS, NONE)

FOR_EACH_OMEGA(EITHER, forward)
FOR_EACH_OMEGA(EITHER, backward)
FOR_EACH_OMEGA(PARTITION, recur)
FOR_EACH_OMEGA(PARTITION, recur_back)
EITHER(forward, FIRST_LAYER)
EITHER(backward, FIRST_LAYER)

static Task *const forward_tasks[][2][2] = {FOR_EACH_OMEGA(ROWS, forward) ROWS(forward, FIRST_LAYER)};
static Task *const backward_tasks[][2][2] = {FOR_EACH_OMEGA(ROWS, backward) ROWS(backward, FIRST_LAYER)};
static Task *const recur_tasks[][2] = {FOR_EACH_OMEGA(ROW, recur)};
static Task *const recur_back_tasks[][2] = {FOR_EACH_OMEGA(ROW, recur_back)};

/* An image and a block of channels at a time. Returns 0, or 1 where there is no memory for the sums. */
static int run(Task *work, const Call *o) {
    const Geometry *g = &o->g;
    int64_t blocks = (g->C + g->block - 1) / g->block;
    int failed = 0;
#pragma omp parallel num_threads((int)g->threads) if (g->threads > 1) reduction(| : failed)
    {
        float *sum = g->overlap ? malloc(sizeof(float) * (size_t)(g->H * g->W * g->block)) : NULL;
        failed = g->overlap && !sum;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < g->B * blocks; task++) {
            int64_t c0 = task % blocks * g->block, c1 = c0 + g->block < g->C ? c0 + g->block : g->C;
            if (!failed) work(o, task / blocks, c0, c1, sum);
        }
        free(sum);
    }
    return failed;
}

int msnn_forward(const Call *o, int kind, int bf16) { return run(forward_tasks[kind][o->g.overlap][bf16], o); }

int msnn_backward(const Call *o, int kind, int bf16) { return run(backward_tasks[kind][o->g.overlap][bf16], o); }

int msnn_recur(const Call *o, int kind, int bf16) { return run(recur_tasks[kind][bf16], o); }

int msnn_recur_back(const Call *o, int kind, int bf16) { return run(recur_back_tasks[kind][bf16], o); }

/* Gradient of spikes by the triangular surrogate, g (1 - min(|u - V|, 1)); NaN stays. */
INLINE void triangular(
    const void *grad, const void *membrane, void *out, int64_t begin, int64_t end, float threshold, int bf16
) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        float x = fabsf(load(membrane, i, bf16) - threshold);
        store(out, i, load(grad, i, bf16) * (1.0f - (x > 1.0f ? 1.0f : x)), bf16);
    }
}

void msnn_triangular(
    const void *grad, const void *membrane, void *out, int64_t n, float threshold, int threads, int bf16
) {
    int64_t size = 16384; /* elements at a time */
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < n; begin += size) {
        int64_t end = begin + size < n ? begin + size : n;
        if (bf16)
            triangular(grad, membrane, out, begin, end, threshold, 1);
        else
            triangular(grad, membrane, out, begin, end, threshold, 0);
    }
}
