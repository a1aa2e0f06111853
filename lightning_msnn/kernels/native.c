/* Layers of neurons on a CPU: from a synapse's current to spikes in one pass forward, and in two backward.
 *
 * native.py compiles and calls this file; layer.py says what is computed. Maps lie in channels-last order, float32 or
 * bfloat16, spikes also as bytes; everything between is float32. A group of images and a block of channels is a task of
 * its own, whose maps fit into the cache. Sums by channel are kept by group, of which there are as many for one thread
 * as for many, so that results do not depend on the number of threads.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined __AVX512BF16__ || defined __AVX512BW__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PI 3.14159265358979323846f

/* In the order of the tables in geometry.py. */
enum { STILL, FIRST, COUPLED, RECURRENT };
enum { SINE, NONE };
enum { BY_SHIFT, BY_SCALE, BY_TAU, BY_THETA, BY_THRESHOLD, SUMS };
/* What neurons return: a step; while annealing a times the step and (1 - a) times max(u, 0); one of several levels, annealed
 * or not. */
enum { STEP, ANNEALED, GRADED };

/* A call. Sizes and numbers in the order in which Python writes them, then pointers; what is not there is NULL. */
typedef struct {
    int64_t images, channels;
    int64_t in_pixels, in_slabs;       /* pixels of an image's current, and in how many pieces they lie in memory */
    int64_t out_pixels, out_slabs;     /* the same of its output */
    int64_t windows, places, run;      /* 0 windows: pixel by pixel, nothing is cut; run: see Task */
    int64_t other_pixels;              /* of the map that a recurrent layer receives */
    int64_t handed;                    /* last channels whose membranes are handed on */
    int64_t groups, block, threads;
    int64_t rows, row_groups, row_block; /* of the current, and how they are shared out where windows play no part */
    int64_t in_overlaps, out_overlaps, padded; /* whether windows do where they are read and written; or have no pixel */
    int64_t form, omega, fires, batch_statistics, tau_stride, level_stride;
    int64_t bf16, bytes, levels;       /* whether maps are bfloat16; whether spikes are bytes; the largest spike */
    double eps, threshold;
    const int32_t *in_index, *out_index, *other_index; /* windows by places: the pixel of each, its end where padded */
    const float *share;                /* of each pixel of the output: one over the number of windows that cover it */
    const void *current, *residual, *other;
    const float *weight, *bias, *running_mean, *running_var; /* of the norm */
    float *norm;                       /* mean, variance, scale, shift by channel */
    const float *tau, *theta, *level, *anneal; /* anneal: the share of the step */
    void *out, *handed_on, *merged;
    const void *grad, *grad_handed, *grad_merged;
    void *grad_current, *grad_other;
    double *moments;                   /* of statistics: row_groups by 2 by channels, zeros */
    double *sums;                      /* groups by SUMS by channels, zeros */
    float *totals;                     /* of sums: SUMS by channels, and what the second pass takes off: 2 by channels */
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

/* Write floats as numbers of a map: by the processor's own conversion, where it has one. */
static void pack(void *p, int64_t at, const float *x, int64_t n, int bf16) {
    if (!bf16) {
        memcpy((float *)p + at, x, sizeof(float) * (size_t)n);
        return;
    }
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 32 <= n; i += 32) {
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
        memcpy((uint16_t *)p + at + i, &pair, sizeof pair);
    }
#endif
#pragma omp simd
    for (int64_t j = i; j < n; j++) store(p, at + j, x[j], 1);
}

/* Store a step, which no rounding changes. */
INLINE void store_step(void *p, int64_t i, int fires, int bf16) {
    if (bf16)
        ((uint16_t *)p)[i] = fires ? 0x3f80u : 0u;
    else
        ((float *)p)[i] = fires ? 1.0f : 0.0f;
}

/* How many of the thresholds v, 2 v, ..., top v a membrane has reached; NaN has reached none. */
INLINE float reached(float u, float v, float top) {
    float k = floorf(u / v);
    k = k > 0.0f ? k : 0.0f;
    return k < top ? k : top;
}

/* Write as bytes the thresholds that membranes reach. Compilers make no vectors of loops that narrow so much. */
static void store_bytes(void *p, int64_t at, const float *x, const float *level, int64_t n, int64_t levels) {
    uint8_t *bytes = (uint8_t *)p + at;
    int64_t i = 0;
    if (levels > 1) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) bytes[j] = (uint8_t)(int32_t)reached(x[j], level[j], (float)levels);
        return;
    }
#ifdef __AVX512BW__
    for (; i + 64 <= n; i += 64) {
        __mmask64 fire = 0;
        for (int k = 0; k < 4; k++) {
            __m512 u = _mm512_loadu_ps(x + i + 16 * k), v = _mm512_loadu_ps(level + i + 16 * k);
            fire |= (__mmask64)_mm512_cmp_ps_mask(u, v, _CMP_GE_OQ) << (16 * k);
        }
        _mm512_storeu_si512(bytes + i, _mm512_maskz_set1_epi8(fire, 1));
    }
    for (; i + 16 <= n; i += 16) {
        __mmask16 fire = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_loadu_ps(level + i), _CMP_GE_OQ);
        __m512i all = _mm512_maskz_set1_epi8((__mmask64)fire, 1);
        memcpy(bytes + i, &all, 16);
    }
#endif
    for (; i < n; i++) bytes[i] = x[i] >= level[i];
}

/* The product of two numbers in half turns, less the nearest whole number; its square; and in its bit the sign of sine
 * and cosine, which changes with each half turn. Beyond 2^22, where floats have no angle, any sign will do. */
typedef struct { float rest, square; uint32_t sign; } Angle;

INLINE Angle angle_of(float p, float q) {
    float turns = p * q, whole = rintf(turns), rest = turns - whole;
    Bits parity;
    parity.f = whole + 12582912.0f; /* 1.5 * 2^23, among numbers whose last bit is worth one */
    return (Angle){rest, rest * rest, parity.u << 31};
}

INLINE float signed_by(uint32_t sign, float x) {
    Bits y;
    y.f = x;
    y.u ^= sign;
    return y.f;
}

/* The polynomials of their degrees that come nearest to the sine and the cosine on [-pi/2, pi/2], to 4e-9 and 6e-8. */
INLINE float sine_of(Angle x) {
    float s = 0.0772201288849756f;
    s = fmaf(s, x.square, -0.5980451740982549f);
    s = fmaf(s, x.square, 2.5500313772807144f);
    s = fmaf(s, x.square, -5.167706878927081f);
    s = fmaf(s, x.square, 3.1415925800447733f);
    return signed_by(x.sign, s * x.rest);
}

INLINE float cosine_of(Angle x) {
    float c = 0.22008065477521782f;
    c = fmaf(c, x.square, -1.33209386585028f);
    c = fmaf(c, x.square, 4.058451341602992f);
    c = fmaf(c, x.square, -4.934795518135688f);
    c = fmaf(c, x.square, 1.0f);
    return signed_by(x.sign, c);
}

typedef struct { float value, by_a, by_b, by_c; } Omega;

/* What a window hands to the next, before the decay, and its derivatives by a, by b and by c = pi theta. */
INLINE Omega omega(int kind, float a, float b, float theta) {
    Omega o = {b, 0.0f, 1.0f, 0.0f}; /* none, and the first layer */
    float c = PI * theta;
    if (kind == SINE) {
        Angle inner = angle_of(theta, b);
        float s = c * sine_of(inner), k = cosine_of(inner);
        Angle outer = angle_of(theta * a, k);
        float slope = 2.0f * cosine_of(outer), by_k = slope * a;
        o.value = 2.0f * sine_of(outer);
        o.by_a = c * (slope * k);
        o.by_b = -c * (by_k * s);
        o.by_c = by_k * k - b * (by_k * s);
    }
    return o;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A task: images b0 to b1 and channels c0 to c0 + n, of group g, with scratch memory. Places are visited in runs that lie
 * one after another wherever they are read or written, so that loops are long: for those, what there is by channel is
 * repeated for each place of a run. Runs longer than one are of all channels. */
typedef struct {
    int64_t g, b0, b1, c0, n, length; /* length: of a run, n by o->run */
    float *x;                         /* rows, where nothing is cut */
    float *merged, *by_x, *by_received; /* maps of an image, where windows overlap */
    float *sums, *threshold;          /* by channel */
    float *tau, *level, *scale, *shift, *mean, *by_tau, *by_theta, *by_shift, *by_scale; /* by place of a run and channel */
    float *u, *d, *owed;              /* of a run in each window: membranes, gradients, those of what was handed on */
} Task;

/* Whether spikes leave the windows at once, and their gradients enter them so, without a map of membranes. */
#define AT_ONCE(FORM, OMEGA) ((FORM) == FIRST || ((FORM) == COUPLED && (OMEGA) == SINE))

static int fires_at_once(const Call *o) {
    int compiled = AT_ONCE(o->form, o->omega); /* for others it is not worth the compiler's time */
    int bare = !o->merged && !o->grad_merged;
    return o->fires && compiled && !o->out_overlaps && !o->padded && bare;
}

static int owes_at_once(const Call *o) {
    return fires_at_once(o) && !o->level && !o->in_overlaps;
}

/* Places of the maps of an image that a task needs, with one more for padding: of membranes, and in the backward pass
 * of the gradients of the current and of the map that was received. */
static int64_t merged_places(const Call *o) {
    return (o->grad ? owes_at_once(o) : fires_at_once(o)) ? 0 : o->out_pixels + 1;
}

static int64_t by_x_places(const Call *o) { return o->grad && o->in_overlaps ? o->in_pixels + 1 : 0; }

static int64_t by_received_places(const Call *o) { return o->grad && o->form == RECURRENT ? o->other_pixels + 1 : 0; }

/* Floats a channel that a task needs. */
static int64_t task_floats_each(const Call *o, int64_t tile) {
    int64_t common = SUMS + 1;
    if (!o->windows) return tile + common;
    return merged_places(o) + by_x_places(o) + by_received_places(o) + common + 21 * o->run;
}

static void share_out(const Call *o, Task *t, float *memory, int64_t tile) {
    int64_t n = t->n, length = t->length = n * o->run;
    t->sums = memory, memory += SUMS * n;
    t->threshold = memory, memory += n;
    for (int64_t c = 0; c < n; c++)
        t->threshold[c] = o->level ? o->level[(t->c0 + c) * o->level_stride] : (float)o->threshold;
    if (!o->windows) {
        t->x = memory, memory += tile * n;
        return;
    }
    float **rows[] = {&t->tau, &t->level, &t->scale, &t->shift, &t->mean, &t->by_tau, &t->by_theta, &t->by_shift, &t->by_scale};
    for (int k = 0; k < 9; k++, memory += length) *rows[k] = memory;
    t->u = memory, memory += 4 * length;
    t->d = memory, memory += 4 * length;
    t->owed = memory, memory += 4 * length;
    t->merged = memory, memory += merged_places(o) * n;
    t->by_x = memory, memory += by_x_places(o) * n;
    t->by_received = memory;
    memset(t->owed, 0, sizeof(float) * (size_t)(4 * length));
    for (int64_t r = 0; r < o->run; r++)
        for (int64_t c = 0; c < n; c++) {
            int64_t at = r * n + c, channel = t->c0 + c;
            t->tau[at] = o->tau ? o->tau[channel * o->tau_stride] : 0.0f;
            t->level[at] = t->threshold[c];
            t->mean[at] = o->norm ? o->norm[channel] : 0.0f;
            t->scale[at] = o->norm ? o->norm[2 * o->channels + channel] : 1.0f;
            t->shift[at] = o->norm ? o->norm[3 * o->channels + channel] : 0.0f;
        }
}

/* Normalise rows of the current. */
INLINE void read_rows(const Call *o, const Task *t, float *x, int64_t row, int64_t rows, int bf16) {
    const float *scale = o->norm + 2 * o->channels + t->c0, *shift = o->norm + 3 * o->channels + t->c0;
    for (int64_t r = 0; r < rows; r++, x += t->n) {
        int64_t at = (row + r) * o->channels + t->c0;
        if (o->norm) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) x[c] = fmaf(load(o->current, at + c, bf16), scale[c], shift[c]);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) x[c] = load(o->current, at + c, bf16);
        }
    }
}

/* The triangular surrogate gradient. */
INLINE float surrogate_of(float x) {
    float y = fabsf(x);
    return 1.0f - (y > 1.0f ? 1.0f : y);
}

/* The sum of the ramps max(y - k, 0) that begin at k = 1, 2, ..., top. */
INLINE float ramps_of(float y, float top) {
    float n = floorf(y);
    n = n > 0.0f ? n : 0.0f, n = n < top ? n : top;
    return n * (y - 0.5f - 0.5f * n);
}

/* The sum of the triangles about v, 2 v, ..., top v: each is a second difference of ramps. */
INLINE float surrogates_of(float u, float v, float top) {
    float half = 1.0f / v, y = u * half, end = top + half; /* half of a triangle's width; beyond, no triangle is met */
    y = y > -half ? y : -half, y = y < end ? y : end;
    float middle = ramps_of(y, top);
    return v * ((ramps_of(y + half, top) - middle) - (middle - ramps_of(y - half, top)));
}

/* The slope of what neurons return. */
INLINE float slope_of(int kind, float u, float v, float a, float top) {
    float h = kind == GRADED ? surrogates_of(u, v, top) : surrogate_of(u - v);
    return kind == STEP ? h : a * h + (1.0f - a) * (u > 0.0f ? 1.0f : 0.0f);
}

/* Store what neurons return. */
INLINE void store_spike(void *p, int64_t i, float u, float v, float a, float top, int kind, int bf16) {
    if (kind == STEP) {
        store_step(p, i, u >= v, bf16);
        return;
    }
    float s = kind == GRADED ? reached(u, v, top) : (u >= v ? 1.0f : 0.0f);
    float mixed = a * s + (1.0f - a) * (u < 0.0f ? 0.0f : u);
    store(p, i, kind == GRADED && a == 1.0f ? s : mixed, bf16);
}

/* A stage with the type of maps, or the kind of spikes as well, known to the compiler. */
#define BY_TYPE(FUNCTION, ...)                                                                                         \
    if (o->bf16)                                                                                                       \
        FUNCTION(o, __VA_ARGS__, 1);                                                                                   \
    else                                                                                                               \
        FUNCTION(o, __VA_ARGS__, 0);
#define BY_KIND(FUNCTION, ...)                                                                                         \
    if (o->levels > 1) {                                                                                               \
        BY_TYPE(FUNCTION, __VA_ARGS__, GRADED)                                                                         \
    } else if (o->anneal) {                                                                                            \
        BY_TYPE(FUNCTION, __VA_ARGS__, ANNEALED)                                                                       \
    } else {                                                                                                           \
        BY_TYPE(FUNCTION, __VA_ARGS__, STEP)                                                                           \
    }

/* Merge, fire and write rows of the output, q their first pixel of the image. */
INLINE void write_rows(const Call *o, const Task *t, float *m, int64_t q, int64_t row, int64_t rows, int kind, int bf16) {
    float a = o->anneal ? *o->anneal : 1.0f, top = (float)o->levels;
    const float *level = t->threshold;
    for (int64_t r = 0; r < rows; r++, m += t->n) {
        int64_t at = (row + r) * o->channels + t->c0;
        float share = o->share ? o->share[q + r] : 1.0f;
        if (o->share) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) m[c] *= share;
        }
        if (!o->fires && o->residual) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) store(o->out, at + c, m[c] + load(o->residual, at + c, bf16), bf16);
        } else if (!o->fires) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) store(o->out, at + c, m[c], bf16);
        } else if (o->bytes) {
            store_bytes(o->out, at, m, level, t->n, o->levels);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) store_spike(o->out, at + c, m[c], level[c], a, top, kind, bf16);
        }
        if (o->merged) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) store(o->merged, at + c, m[c], bf16);
        }
    }
}

static void read_out(const Call *o, const Task *t, float *x, int64_t row, int64_t rows) {
    BY_TYPE(read_rows, t, x, row, rows)
}

static void write_in(const Call *o, const Task *t, float *m, int64_t q, int64_t row, int64_t rows) {
    BY_KIND(write_rows, t, m, q, row, rows)
}

/* Pieces of an image: for each, its first pixel and its first row in memory. */
#define PIECES(PIXELS, SLABS)                                                                                          \
    for (int64_t s = 0, rows = (PIXELS) / (SLABS), q = 0, row = b * rows; s < (SLABS);                                 \
         s++, q += rows, row += o->images * rows)

/* Where a run of places lies in each window: in memory, and as pixels of an image; ok is 0 where it is padding. */
typedef struct {
    int64_t in[4], out[4], map[4], in_pixel[4], out_pixel[4], map_pixel[4], beside[4];
    float in_ok[4], map_ok[4];
} Spot;

INLINE Spot locate(const Call *o, const Task *t, int64_t b, int64_t i) {
    Spot s;
    for (int k = 0; k < 4; k++) {
        int64_t j = k * o->places + i, beside = (k * o->images + b) * o->places + i;
        s.in_pixel[k] = o->in_index[j], s.out_pixel[k] = o->out_index[j], s.map_pixel[k] = o->other_index[j];
        int in_ok = s.in_pixel[k] < o->in_pixels, map_ok = s.map_pixel[k] < o->other_pixels;
        int64_t in = o->in_slabs > 1 ? beside : b * o->in_pixels + (in_ok ? s.in_pixel[k] : 0);
        int64_t out = o->out_slabs > 1 ? beside : b * o->out_pixels + s.out_pixel[k]; /* where it is padding, not used */
        s.in_ok[k] = (float)in_ok, s.map_ok[k] = (float)map_ok;
        s.in[k] = in * o->channels + t->c0, s.out[k] = out * o->channels + t->c0;
        s.map[k] = (b * o->other_pixels + (map_ok ? s.map_pixel[k] : 0)) * o->channels + t->c0;
        s.beside[k] = beside * o->channels + t->c0;
    }
    return s;
}

/* The normalised current, and a membrane that was received: nothing, where a place is padding. */
#define X(k) ((padded ? s.in_ok[k] : 1.0f) * fmaf(load(o->current, s.in[k] + c, bf16), scale[c], shift[c]))
#define RECEIVED(k) ((padded ? s.map_ok[k] : 1.0f) * load(o->other, s.map[k] + c, bf16))
#define BEFORE(k) load(o->other, s.beside[k] + c, bf16)
#define VALUE(A, B) (tau[c] * omega(omega_kind, A, B, theta).value)

/* Visit the windows of an image: spikes, or sums of membranes on its map; and the membranes that are handed on. */
INLINE void visit(
    const Call *o, const Task *t, int64_t b, int form, int omega_kind, int fires, int bytes, int padded, int kind, int bf16
) {
    int64_t n = t->length;
    float theta = o->theta ? *o->theta : 0.0f, a = o->anneal ? *o->anneal : 1.0f, top = (float)o->levels;
    const float *tau = t->tau, *scale = t->scale, *shift = t->shift, *level = t->level;
    float *u0 = t->u, *u1 = u0 + n, *u2 = u1 + n, *u3 = u2 + n;
    if (!fires) memset(t->merged, 0, sizeof(float) * (size_t)((o->out_pixels + 1) * t->n));
    for (int64_t i = 0; i < o->places; i += o->run) {
        Spot s = locate(o, t, b, i);
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float u = X(0), v, w, z;
            if (form == RECURRENT) {
                float r = RECEIVED(1);
                u += VALUE(RECEIVED(0), r);
                v = X(1) + VALUE(u, r);
                w = X(2) + VALUE(RECEIVED(2), v);
                z = X(3) + VALUE(RECEIVED(3), w);
            } else if (form == COUPLED) {
                v = X(1) + VALUE(BEFORE(0), u);
                w = X(2) + VALUE(BEFORE(1), v);
                z = X(3) + VALUE(BEFORE(2), w);
            } else if (form == FIRST) {
                v = fmaf(tau[c], u, X(1));
                w = fmaf(tau[c], v, X(2));
                z = fmaf(tau[c], w, X(3));
            } else {
                v = X(1), w = X(2), z = X(3);
            }
            if (fires && !bytes) {
                store_spike(o->out, s.out[0] + c, u, level[c], a, top, kind, bf16);
                store_spike(o->out, s.out[1] + c, v, level[c], a, top, kind, bf16);
                store_spike(o->out, s.out[2] + c, w, level[c], a, top, kind, bf16);
                store_spike(o->out, s.out[3] + c, z, level[c], a, top, kind, bf16);
            }
            if (!fires || bytes || form == FIRST) u0[c] = u, u1[c] = v, u2[c] = w, u3[c] = z;
        }
        for (int k = 0; k < 4 && bytes; k++) store_bytes(o->out, s.out[k], t->u + k * n, level, n, o->levels);
        for (int k = 0; k < 4 && !fires; k++) {
            float *m = t->merged + s.out_pixel[k] * t->n;
            const float *u = t->u + k * n;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) m[c] += u[c];
        }
        if (form != FIRST || !o->handed_on) continue;
        int64_t skip = o->channels - o->handed - t->c0, begin = skip > 0 ? skip : 0;
        for (int k = 0; k < 3 && begin < n; k++)
            pack(o->handed_on, ((k * o->images + b) * o->places + i) * o->handed + begin - skip, t->u + k * n + begin, n - begin, bf16);
    }
}

/* Back through the windows of an image. Where they do not overlap, gradients of spikes are taken and those of the current
 * given at once; else both are on the image's map in scratch memory. */
INLINE void revisit(
    const Call *o, const Task *t, int64_t b, int form, int omega_kind, int at_once, int in_overlaps, int padded, int kind,
    int bf16
) {
    int64_t n = t->length;
    float theta = o->theta ? *o->theta : 0.0f, a = o->anneal ? *o->anneal : 1.0f, top = (float)o->levels;
    const float *tau = t->tau, *scale = t->scale, *shift = t->shift, *level = t->level;
    float *by_tau = t->by_tau, *by_theta = t->by_theta;
    float *g0 = t->owed, *g1 = g0 + n, *g2 = g1 + n;
    float *e0 = t->d, *e1 = e0 + n, *e2 = e1 + n, *e3 = e2 + n, *a0 = t->u, *a1 = a0 + n, *a2 = a1 + n, *a3 = a2 + n;
    if (in_overlaps) memset(t->by_x, 0, sizeof(float) * (size_t)((o->in_pixels + 1) * t->n));
    if (form == RECURRENT) memset(t->by_received, 0, sizeof(float) * (size_t)((o->other_pixels + 1) * t->n));
    if (!at_once) memset(t->merged + o->out_pixels * t->n, 0, sizeof(float) * (size_t)t->n);
    for (int64_t i = 0; i < o->places; i += o->run) {
        Spot s = locate(o, t, b, i);
        int64_t skip = o->channels - o->handed - t->c0, begin = skip > 0 ? skip : 0;
        if (form == FIRST && o->grad_handed)
            for (int k = 0; k < 3; k++) {
                int64_t at = ((k * o->images + b) * o->places + i) * o->handed - skip;
                float *g = t->owed + k * n;
#pragma omp simd
                for (int64_t c = begin; c < n; c++) g[c] = load(o->grad_handed, at + c, bf16);
            }
        const float *m0 = t->merged + s.out_pixel[0] * t->n, *m1 = t->merged + s.out_pixel[1] * t->n;
        const float *m2 = t->merged + s.out_pixel[2] * t->n, *m3 = t->merged + s.out_pixel[3] * t->n;
#define OWED(k, U)                                                                                                     \
    (at_once ? load(o->grad, s.out[k] + c, bf16) * slope_of(kind, U, level[c], a, top) : m##k[c])
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float u = X(0), d0, d1, d2, d3, l = tau[c];
            if (form == RECURRENT) {
                float r0 = RECEIVED(0), r1 = RECEIVED(1), r2 = RECEIVED(2), r3 = RECEIVED(3);
                Omega o0 = omega(omega_kind, r0, r1, theta);
                u += l * o0.value;
                Omega o1 = omega(omega_kind, u, r1, theta);
                float v = X(1) + l * o1.value;
                Omega o2 = omega(omega_kind, r2, v, theta);
                float w = X(2) + l * o2.value;
                Omega o3 = omega(omega_kind, r3, w, theta);
                d3 = OWED(3, X(3) + l * o3.value);
                d2 = OWED(2, w) + l * d3 * o3.by_b;
                d1 = OWED(1, v) + l * d2 * o2.by_b;
                d0 = OWED(0, u) + l * d1 * o1.by_a;
                by_tau[c] += (d3 * o3.value + d2 * o2.value) + (d1 * o1.value + d0 * o0.value);
                by_theta[c] += l * ((d3 * o3.by_c + d2 * o2.by_c) + (d1 * o1.by_c + d0 * o0.by_c));
                a0[c] = l * d0 * o0.by_a;
                a1[c] = l * (d1 * o1.by_b + d0 * o0.by_b);
                a2[c] = l * d2 * o2.by_a;
                a3[c] = l * d3 * o3.by_a;
            } else if (form == COUPLED) {
                Omega o1 = omega(omega_kind, BEFORE(0), u, theta);
                float v = X(1) + l * o1.value;
                Omega o2 = omega(omega_kind, BEFORE(1), v, theta);
                float w = X(2) + l * o2.value;
                Omega o3 = omega(omega_kind, BEFORE(2), w, theta);
                d3 = OWED(3, X(3) + l * o3.value);
                d2 = OWED(2, w) + l * d3 * o3.by_b;
                d1 = OWED(1, v) + l * d2 * o2.by_b;
                d0 = OWED(0, u) + l * d1 * o1.by_b;
                by_tau[c] += d3 * o3.value + d2 * o2.value + d1 * o1.value;
                by_theta[c] += l * (d3 * o3.by_c + d2 * o2.by_c + d1 * o1.by_c);
                a0[c] = l * d1 * o1.by_a;
                a1[c] = l * d2 * o2.by_a;
                a2[c] = l * d3 * o3.by_a;
            } else if (form == FIRST) {
                float v = fmaf(l, u, X(1)), w = fmaf(l, v, X(2));
                d3 = OWED(3, fmaf(l, w, X(3)));
                d2 = fmaf(l, d3, OWED(2, w)) + g2[c];
                d1 = fmaf(l, d2, OWED(1, v)) + g1[c];
                d0 = fmaf(l, d1, OWED(0, u)) + g0[c];
                by_tau[c] += d3 * w + d2 * v + d1 * u;
            } else {
                d0 = OWED(0, u), d1 = OWED(1, X(1)), d2 = OWED(2, X(2)), d3 = OWED(3, X(3));
            }
            e0[c] = d0, e1[c] = d1, e2[c] = d2, e3[c] = d3;
        }
        for (int k = 0; k < 4; k++) {
            const float *d = t->d + k * n, *mean = t->mean;
            float *by_x = t->by_x + s.in_pixel[k] * t->n, *by_shift = t->by_shift, *by_scale = t->by_scale, *a = t->u + k * n;
            if (form == RECURRENT) {
                float *by_received = t->by_received + s.map_pixel[k] * t->n;
#pragma omp simd
                for (int64_t c = 0; c < n; c++) by_received[c] += a[c];
            }
            if (form == COUPLED && k < 3) pack(o->grad_other, s.beside[k], a, n, bf16);
            if (in_overlaps) {
#pragma omp simd
                for (int64_t c = 0; c < n; c++) by_x[c] += d[c];
                continue;
            }
            if (padded && s.in_ok[k] == 0.0f) continue;
            if (o->norm) {
#pragma omp simd
                for (int64_t c = 0; c < n; c++) {
                    by_shift[c] += d[c];
                    by_scale[c] += d[c] * (load(o->current, s.in[k] + c, bf16) - mean[c]);
                }
            }
            if (o->norm && !o->batch_statistics) {
#pragma omp simd
                for (int64_t c = 0; c < n; c++) store(o->grad_current, s.in[k] + c, scale[c] * d[c], bf16);
            } else {
                pack(o->grad_current, s.in[k], d, n, bf16);
            }
        }
    }
    if (form == RECURRENT)
        for (int64_t q = 0; q < o->other_pixels; q++)
            pack(o->grad_other, (b * o->other_pixels + q) * o->channels + t->c0, t->by_received + q * t->n, t->n, bf16);
}

/* A pass with the form, the projection, the type and the rest known to the compiler. */
#define VISIT(FORM, OMEGA)                                                                                             \
    if (!AT_ONCE(FORM, OMEGA) || !at_once) {                                                                           \
        BY_TYPE(visit, t, b, FORM, OMEGA, 0, 0, 1, STEP)                                                               \
    } else if (o->bytes) {                                                                                             \
        BY_TYPE(visit, t, b, FORM, OMEGA, 1, 1, 0, STEP)                                                               \
    } else {                                                                                                           \
        BY_KIND(visit, t, b, FORM, OMEGA, 1, 0, 0)                                                                     \
    }
#define REVISIT(FORM, OMEGA)                                                                                           \
    if (!AT_ONCE(FORM, OMEGA) || !at_once) {                                                                           \
        BY_TYPE(revisit, t, b, FORM, OMEGA, 0, (int)o->in_overlaps, 1, STEP)                                           \
    } else {                                                                                                           \
        BY_KIND(revisit, t, b, FORM, OMEGA, 1, 0, 0)                                                                   \
    }
#define DISPATCH(NAME, DO)                                                                                             \
    static void NAME(const Call *o, const Task *t, int64_t b, int at_once) {                                           \
        if (o->form == STILL) {                                                                                        \
            DO(STILL, NONE)                                                                                            \
        } else if (o->form == FIRST) {                                                                                 \
            DO(FIRST, NONE)                                                                                            \
        } else if (o->form == COUPLED && o->omega == SINE) {                                                           \
            DO(COUPLED, SINE)                                                                                          \
        } else if (o->form == COUPLED) {                                                                               \
            DO(COUPLED, NONE)                                                                                          \
        } else if (o->omega == SINE) {                                                                                 \
            DO(RECURRENT, SINE)                                                                                        \
        } else {                                                                                                       \
            DO(RECURRENT, NONE)                                                                                        \
        }                                                                                                              \
    }
DISPATCH(visit_windows, VISIT)
DISPATCH(revisit_windows, REVISIT)

/* Normalise and fire rows that are independent of each other, or add the stream to them. */
INLINE void fire_rows(const Call *o, const Task *t, int64_t row, int64_t rows, int normed, int kind, int bf16) {
    const float *scale = o->norm + 2 * o->channels + t->c0, *shift = o->norm + 3 * o->channels + t->c0;
    const float *level = t->threshold;
    float a = o->anneal ? *o->anneal : 1.0f, top = (float)o->levels;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (row + r) * o->channels + t->c0;
#pragma omp simd
        for (int64_t c = 0; c < t->n; c++) {
            float x = load(o->current, at + c, bf16);
            x = normed ? fmaf(x, scale[c], shift[c]) : x;
            store_spike(o->out, at + c, x, level[c], a, top, kind, bf16);
        }
    }
}

INLINE void add_stream(const Call *o, const Task *t, int64_t row, int64_t rows, int bf16) {
    const float *scale = o->norm + 2 * o->channels + t->c0, *shift = o->norm + 3 * o->channels + t->c0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (row + r) * o->channels + t->c0;
        float *x = t->x + r * t->n;
        if (o->residual) {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++)
                x[c] = fmaf(load(o->current, at + c, bf16), scale[c], shift[c]) + load(o->residual, at + c, bf16);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) x[c] = fmaf(load(o->current, at + c, bf16), scale[c], shift[c]);
        }
        pack(o->out, at, x, t->n, bf16);
    }
}

static void fire(const Call *o, const Task *t, int64_t row, int64_t rows) {
    if (o->norm) {
        BY_KIND(fire_rows, t, row, rows, 1)
    } else {
        BY_KIND(fire_rows, t, row, rows, 0)
    }
}

static void forward(const Call *o, Task *t, int64_t tile) {
    for (int64_t b = t->b0; b < t->b1; b += tile) {
        if (!o->windows) {
            int64_t rows = least(tile, t->b1 - b);
            if (o->fires && !o->bytes && !o->merged) {
                fire(o, t, b, rows);
            } else if (!o->fires && o->norm && !o->merged) {
                BY_TYPE(add_stream, t, b, rows)
            } else {
                read_out(o, t, t->x, b, rows);
                write_in(o, t, t->x, 0, b, rows);
            }
            continue;
        }
        int at_once = fires_at_once(o);
        visit_windows(o, t, b, at_once);
        if (at_once) continue;
        PIECES(o->out_pixels, o->out_slabs) write_in(o, t, t->merged + q * t->n, q, row, rows);
    }
}

/* From the gradient of what rows of neurons return to that of their membranes' sums, which takes their place. */
INLINE void owe_rows(const Call *o, const Task *t, float *m, int64_t q, int64_t row, int64_t rows, int kind, int bf16) {
    float a = o->anneal ? *o->anneal : 1.0f, top = (float)o->levels;
    const float *level = t->threshold;
    float *by_level = t->sums + BY_THRESHOLD * t->n;
    int64_t n = t->n;
    for (int64_t r = 0; r < rows; r++, m += n) {
        int64_t at = (row + r) * o->channels + t->c0;
        float share = o->share ? o->share[q + r] : 1.0f;
        if (!o->fires) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) m[c] = load(o->grad, at + c, bf16);
        } else {
            for (int64_t i = 1; o->level && i <= o->levels; i++) {
                float k = (float)i;
#pragma omp simd
                for (int64_t c = 0; c < n; c++)
                    by_level[c] -= a * k * surrogate_of(share * m[c] - k * level[c]) * load(o->grad, at + c, bf16);
            }
#pragma omp simd
            for (int64_t c = 0; c < n; c++)
                m[c] = slope_of(kind, share * m[c], level[c], a, top) * load(o->grad, at + c, bf16);
        }
        if (o->grad_merged) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) m[c] += load(o->grad_merged, at + c, bf16);
        }
        if (o->share) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) m[c] *= share;
        }
    }
}

static void owe(const Call *o, const Task *t, float *m, int64_t q, int64_t row, int64_t rows) {
    BY_KIND(owe_rows, t, m, q, row, rows)
}

/* Write the gradient of rows of the normalised current, or where the norm's statistics are constants of the current,
 * and add to the sums by channel. */
INLINE void settle_rows(const Call *o, const Task *t, const float *d, int64_t row, int64_t rows, int bf16) {
    const float *mean = o->norm + t->c0, *scale = o->norm + 2 * o->channels + t->c0;
    float *by_shift = t->sums + BY_SHIFT * t->n, *by_scale = t->sums + BY_SCALE * t->n;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (row + r) * o->channels + t->c0;
        const float *p = d + r * t->n;
        if (!o->norm || o->batch_statistics) {
            if (t->n < o->channels) pack(o->grad_current, at, p, t->n, bf16);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) store(o->grad_current, at + c, scale[c] * p[c], bf16);
        }
        if (!o->norm) continue;
#pragma omp simd
        for (int64_t c = 0; c < t->n; c++) {
            by_shift[c] += p[c];
            by_scale[c] += p[c] * (load(o->current, at + c, bf16) - mean[c]);
        }
    }
    if (t->n == o->channels && (!o->norm || o->batch_statistics)) pack(o->grad_current, row * t->n, d, rows * t->n, bf16);
}

static void settle(const Call *o, const Task *t, const float *d, int64_t row, int64_t rows) {
    BY_TYPE(settle_rows, t, d, row, rows)
}

/* Rows that are independent of each other: the gradient of the normalised current is cheaper made twice than kept. The
 * first pass takes its sums, several rows at a time; the second, which is the first where statistics are constants, writes
 * the gradient of the current. */
INLINE float owed_of(
    const Call *o, int64_t at, float scale, float shift, float level, float a, float *x, int fires, int kind, int bf16
) {
    float g = load(o->grad, at, bf16);
    *x = load(o->current, at, bf16);
    return fires ? g * slope_of(kind, fmaf(*x, scale, shift), level, a, (float)o->levels) : g;
}

INLINE void sum_rows(const Call *o, const Task *t, int64_t row, int64_t rows, int fires, int kind, int bf16) {
    const float *mean = o->norm + t->c0, *scale = mean + 2 * o->channels, *shift = scale + o->channels;
    const float *level = t->threshold;
    float *by_shift = t->sums + BY_SHIFT * t->n, *by_scale = t->sums + BY_SCALE * t->n;
    float a = o->anneal ? *o->anneal : 1.0f;
    int64_t r = 0, n = t->n, step = o->channels;
    for (; r + 4 <= rows; r += 4) {
        int64_t at = (row + r) * step + t->c0;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float x, y, z, w, m = mean[c];
            float p = owed_of(o, at + c, scale[c], shift[c], level[c], a, &x, fires, kind, bf16);
            float q = owed_of(o, at + step + c, scale[c], shift[c], level[c], a, &y, fires, kind, bf16);
            float u = owed_of(o, at + 2 * step + c, scale[c], shift[c], level[c], a, &z, fires, kind, bf16);
            float v = owed_of(o, at + 3 * step + c, scale[c], shift[c], level[c], a, &w, fires, kind, bf16);
            by_shift[c] += (p + q) + (u + v);
            by_scale[c] += (p * (x - m) + q * (y - m)) + (u * (z - m) + v * (w - m));
        }
    }
    for (; r < rows; r++) {
        int64_t at = (row + r) * step + t->c0;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float x, p = owed_of(o, at + c, scale[c], shift[c], level[c], a, &x, fires, kind, bf16);
            by_shift[c] += p;
            by_scale[c] += p * (x - mean[c]);
        }
    }
}

/* The gradient of the current: what its statistics owe is taken off, or nothing. */
INLINE void owe_current(const Call *o, const Task *t, int64_t row, int64_t rows, int fires, int kind, int bf16) {
    const float *mean = o->norm + t->c0, *scale = mean + 2 * o->channels, *shift = scale + o->channels;
    const float *level = t->threshold, *by_mean = o->totals + SUMS * o->channels + t->c0;
    const float *by_spread = by_mean + o->channels;
    float a = o->anneal ? *o->anneal : 1.0f;
    int64_t n = t->n;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (row + r) * o->channels + t->c0;
        float *d = t->x + r * n;
        if (o->batch_statistics) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                float x, p = owed_of(o, at + c, scale[c], shift[c], level[c], a, &x, fires, kind, bf16);
                d[c] = fmaf(x - mean[c], by_spread[c], fmaf(p, scale[c], by_mean[c]));
            }
        } else {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                float x;
                d[c] = scale[c] * owed_of(o, at + c, scale[c], shift[c], level[c], a, &x, fires, kind, bf16);
            }
        }
        if (n != o->channels) pack(o->grad_current, at, d, n, bf16);
    }
    if (n == o->channels) pack(o->grad_current, row * n, t->x, rows * n, bf16);
}

#define BACK(NAME, FUNCTION)                                                                                           \
    static void NAME(const Call *o, const Task *t, int64_t row, int64_t rows) {                                        \
        if (!o->fires) {                                                                                               \
            BY_TYPE(FUNCTION, t, row, rows, 0, STEP)                                                                   \
        } else {                                                                                                       \
            BY_KIND(FUNCTION, t, row, rows, 1)                                                                         \
        }                                                                                                              \
    }
BACK(sum, sum_rows)
BACK(owe_input, owe_current)

/* Whether gradients are made twice. */
static int is_twice(const Call *o) {
    return !o->windows && o->norm && !o->level && !o->grad_merged;
}

static void backward(const Call *o, Task *t, int64_t tile) {
    for (int64_t b = t->b0; b < t->b1; b += tile) {
        memset(t->sums, 0, sizeof(float) * (size_t)(SUMS * t->n));
        if (!o->windows) {
            int64_t rows = least(tile, t->b1 - b);
            if (is_twice(o)) {
                sum(o, t, b, rows);
                if (!o->batch_statistics) owe_input(o, t, b, rows);
            } else {
                if (o->fires) read_out(o, t, t->x, b, rows);
                owe(o, t, t->x, 0, b, rows);
                settle(o, t, t->x, b, rows);
            }
        } else {
            int at_once = owes_at_once(o);
            memset(t->by_tau, 0, sizeof(float) * (size_t)(4 * t->length));
            if (!at_once) {
                if (o->form != STILL || o->fires) visit_windows(o, t, b, 0);
                PIECES(o->out_pixels, o->out_slabs) owe(o, t, t->merged + q * t->n, q, row, rows);
            }
            revisit_windows(o, t, b, at_once);
            if (o->in_overlaps) {
                PIECES(o->in_pixels, o->in_slabs) settle(o, t, t->by_x + q * t->n, row, rows);
            }
            for (int64_t r = 0; r < o->run; r++)
#pragma omp simd
                for (int64_t c = 0; c < t->n; c++) {
                    t->sums[BY_TAU * t->n + c] += t->by_tau[r * t->n + c];
                    t->sums[BY_THETA * t->n + c] += t->by_theta[r * t->n + c];
                    t->sums[BY_SHIFT * t->n + c] += t->by_shift[r * t->n + c];
                    t->sums[BY_SCALE * t->n + c] += t->by_scale[r * t->n + c];
                }
        }
        for (int64_t k = 0; k < (is_twice(o) ? BY_TAU : SUMS); k++) {
            double *total = o->sums + (t->g * SUMS + k) * o->channels + t->c0;
#pragma omp simd
            for (int64_t c = 0; c < t->n; c++) total[c] += t->sums[k * t->n + c];
        }
    }
}

/* Sums of what the rows of a group differ from the first row, and of its squares: no two large numbers are subtracted. */
INLINE void add_rows(const Call *o, int64_t r0, int64_t r1, int64_t c0, int64_t n, float *sum, double *total, int bf16) {
    float *square = sum + n, *first = square + n;
#pragma omp simd
    for (int64_t c = 0; c < n; c++) first[c] = load(o->current, c0 + c, bf16);
    for (int64_t r = r0; r < r1; r += 128) {
        int64_t end = least(r + 128, r1), i = r;
        memset(sum, 0, sizeof(float) * 2 * (size_t)n);
        for (; i + 4 <= end; i += 4) {
            int64_t at = i * o->channels + c0, step = o->channels;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                float x = load(o->current, at + c, bf16) - first[c], y = load(o->current, at + step + c, bf16) - first[c];
                float z = load(o->current, at + 2 * step + c, bf16) - first[c];
                float w = load(o->current, at + 3 * step + c, bf16) - first[c];
                sum[c] += (x + y) + (z + w);
                square[c] += (x * x + y * y) + (z * z + w * w);
            }
        }
        for (; i < end; i++) {
            int64_t at = i * o->channels + c0;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                float x = load(o->current, at + c, bf16) - first[c];
                sum[c] += x;
                square[c] += x * x;
            }
        }
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            total[c] += sum[c];
            total[o->channels + c] += square[c];
        }
    }
}

/* Scale and shift from mean and variance. */
static void normalise(const Call *o) {
    int64_t n = o->channels;
    float *mean = o->norm, *var = mean + n, *scale = var + n, *shift = scale + n;
    for (int64_t c = 0; c < n; c++) {
        double s = (o->weight ? o->weight[c] : 1.0) / sqrt((double)var[c] + o->eps);
        scale[c] = (float)s;
        shift[c] = (float)((o->bias ? o->bias[c] : 0.0) - mean[c] * s);
    }
}

/* The norm of running statistics. */
static void normalise_running(const Call *o) {
    memcpy(o->norm, o->running_mean, sizeof(float) * (size_t)o->channels);
    memcpy(o->norm + o->channels, o->running_var, sizeof(float) * (size_t)o->channels);
    normalise(o);
}

/* The parts of a call that threads share. Each ends where all threads have ended it. */

static void take_moments(const Call *o, float *memory) {
    int64_t n = o->channels, blocks = (n + o->row_block - 1) / o->row_block;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < o->row_groups * blocks; i++) {
        int64_t g = i / blocks, c0 = i % blocks * o->row_block, width = least(o->row_block, n - c0);
        int64_t r0 = o->rows * g / o->row_groups, r1 = o->rows * (g + 1) / o->row_groups;
        BY_TYPE(add_rows, r0, r1, c0, width, memory, o->moments + g * 2 * n + c0)
    }
#pragma omp single
    {
        double *total = o->moments, rows = (double)o->rows;
        for (int64_t g = 1; g < o->row_groups; g++)
#pragma omp simd
            for (int64_t c = 0; c < 2 * n; c++) total[c] += total[g * 2 * n + c];
        for (int64_t c = 0; c < n; c++) {
            double mean = total[c] / rows, var = total[n + c] / rows - mean * mean;
            o->norm[c] = (float)(mean + load(o->current, c, (int)o->bf16));
            o->norm[n + c] = (float)(var < 0.0 ? 0.0 : var); /* NaN stays */
        }
        normalise(o);
    }
}

static void second_pass(const Call *o, Task *t, int64_t tile) {
    for (int64_t b = t->b0; b < t->b1; b += tile) owe_input(o, t, b, least(tile, t->b1 - b));
}

typedef void Pass(const Call *, Task *, int64_t tile);

static int64_t tile_of(const Call *o) { return o->windows ? 1 : 8192 / o->block + 4; }

static void do_tasks(Pass *pass, const Call *o, float *memory) {
    int64_t blocks = (o->channels + o->block - 1) / o->block, tile = tile_of(o);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < o->groups * blocks; i++) {
        Task t = {.g = i / blocks, .c0 = i % blocks * o->block};
        t.b0 = o->images * t.g / o->groups, t.b1 = o->images * (t.g + 1) / o->groups;
        t.n = least(o->block, o->channels - t.c0);
        share_out(o, &t, memory, tile);
        pass(o, &t, tile);
    }
}

/* What the statistics of the norm owe, by channel, from the sums over all rows. */
static void take_totals(const Call *o, double rows) {
    int64_t n = o->channels;
    float *by_mean = o->totals + SUMS * n, *by_spread = by_mean + n;
    for (int64_t c = 0; c < n; c++) {
        double scale = o->norm[2 * n + c], spread = (double)o->norm[n + c] + o->eps;
        by_mean[c] = (float)(-scale * o->totals[BY_SHIFT * n + c] / rows);
        by_spread[c] = (float)(-scale * o->totals[BY_SCALE * n + c] / rows / spread);
    }
}

/* The gradient of the current, in the place of that of the normalised one: what its statistics owe is taken off. */
INLINE void take_off(const Call *o, int64_t r0, int64_t r1, int bf16) {
    const float *mean = o->norm, *scale = o->norm + 2 * o->channels;
    const float *by_mean = o->totals + SUMS * o->channels, *by_spread = by_mean + o->channels;
    float d[1024];
    for (int64_t r = r0; r < r1; r++)
        for (int64_t c0 = 0; c0 < o->channels; c0 += 1024) {
            int64_t at = r * o->channels + c0, n = least(1024, o->channels - c0);
            const float *m = mean + c0, *s = scale + c0, *p = by_mean + c0, *q = by_spread + c0;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                float x = load(o->current, at + c, bf16) - m[c];
                d[c] = fmaf(x, q[c], fmaf(load(o->grad_current, at + c, bf16), s[c], p[c]));
            }
            pack(o->grad_current, at, d, n, bf16);
        }
}

static void take_off_all(const Call *o) {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < o->row_groups; g++) {
        int64_t r0 = o->rows * g / o->row_groups, r1 = o->rows * (g + 1) / o->row_groups;
        BY_TYPE(take_off, r0, r1)
    }
}

static size_t task_floats(const Call *o) {
    int64_t floats = task_floats_each(o, tile_of(o)) * o->block, rows = 3 * o->row_block;
    return (size_t)(floats > rows ? floats : rows);
}

/* Memory for each thread's tasks, or NULL. */
static float *memory_for(const Call *o, size_t floats) {
    return aligned_alloc(64, (floats * (size_t)o->threads * sizeof(float) + 63) / 64 * 64);
}

/* Each of these returns 0, or 1 where there is no memory. */

int msnn_forward(const Call *o) {
    size_t floats = (task_floats(o) + 16) / 16 * 16;
    float *memory = memory_for(o, floats);
    if (!memory) return 1;
    if (o->norm && !o->batch_statistics) normalise_running(o);
#pragma omp parallel num_threads((int)o->threads) if (o->threads > 1)
    {
        float *mine = memory + (size_t)omp_get_thread_num() * floats;
        if (o->batch_statistics) take_moments(o, mine);
        do_tasks(forward, o, mine);
    }
    free(memory);
    return 0;
}

int msnn_backward(const Call *o) {
    size_t floats = (task_floats(o) + 16) / 16 * 16;
    float *memory = memory_for(o, floats);
    if (!memory) return 1;
#pragma omp parallel num_threads((int)o->threads) if (o->threads > 1)
    {
        do_tasks(backward, o, memory + (size_t)omp_get_thread_num() * floats);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < SUMS; k++) {
            double *total = o->sums + k * o->channels;
            for (int64_t g = 1; g < o->groups; g++)
#pragma omp simd
                for (int64_t c = 0; c < o->channels; c++) total[c] += total[g * SUMS * o->channels + c];
#pragma omp simd
            for (int64_t c = 0; c < o->channels; c++) o->totals[k * o->channels + c] = (float)total[c];
        }
        if (o->batch_statistics) {
#pragma omp single
            take_totals(o, (double)o->rows);
            if (is_twice(o))
                do_tasks(second_pass, o, memory + (size_t)omp_get_thread_num() * floats);
            else
                take_off_all(o);
        }
    }
    free(memory);
    return 0;
}
