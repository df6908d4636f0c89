/* The loops over elements; _native.c compiles them once for each instruction set.
 *
 * Memory: a sum reads each element once, with float32 or float64 state in registers; scaling reads
 * and writes each once; clamping reads each once, and a piece that it writes once more.
 *
 * KERNEL(name) is the function of one instruction set. No kernel depends on alignment, and each
 * adds in the same order in every instruction set, so that all of them give the same bits.
 *
 * Quick sums run in float32 for BLOCK elements, 8 in each lane, then in float64. One rounding of
 * the square and ten of sums limit the error of the norm to 11 / 2 * 2**-24 = 3.3e-7, on any data. If a
 * sum may have left the range of float32, the caller takes the exact one: in float64 from the first
 * element on, where the square of a float32 is exact and always in range.
 */

#include "_native_elements.h"

/* Quick sums. ---------------------------------------------------------------------------------- */

#define SQUARE(v) ((v) * (v))
#define MAGNITUDE(v) ((f32v)((u32v)(v) & 0x7fffffff))
#define ADD_PAIR(NAME, TERM, x, one, other)                                                       \
    do {                                                                                          \
        f32v first, second;                                                                       \
        KERNEL(read_##NAME)(x, &first, &second);                                                  \
        one += TERM(first);                                                                       \
        other += TERM(second);                                                                    \
    } while (0)

#define QUICK_SUM(TYPE, NAME, WHAT, TERM)                                                         \
    FUNCTION double KERNEL(quick_##WHAT##_##NAME)(const void *data, int64_t n)                    \
    {                                                                                             \
        const TYPE *x = data;                                                                     \
        f64v sums[4] = {{0}};                                                                     \
        while (n > 0) {                                                                           \
            f32v a = {0}, b = {0}, c = {0}, d = {0};                                              \
            half_f32v halves[2];                                                                  \
            int64_t left = n < BLOCK ? n : BLOCK;                                                 \
            n -= left;                                                                            \
            for (; left >= 2 * PAIR; left -= 2 * PAIR, x += 2 * PAIR) {                           \
                ADD_PAIR(NAME, TERM, x, a, b);                                                    \
                ADD_PAIR(NAME, TERM, x + PAIR, c, d);                                             \
            }                                                                                     \
            if (left >= PAIR) {                                                                   \
                ADD_PAIR(NAME, TERM, x, a, b);                                                    \
                left -= PAIR, x += PAIR;                                                          \
            }                                                                                     \
            if (left > 0) {                                                                       \
                TYPE rest[PAIR] = {0};                                                            \
                memcpy(rest, x, (size_t)left * sizeof *x);                                        \
                ADD_PAIR(NAME, TERM, rest, c, d);                                                 \
            }                                                                                     \
            a = (a + b) + (c + d);                                                                \
            memcpy(halves, &a, sizeof a);                                                         \
            sums[0] += __builtin_convertvector(halves[0], f64v);                                  \
            sums[1] += __builtin_convertvector(halves[1], f64v);                                  \
        }                                                                                         \
        return added(sums);                                                                       \
    }

#define QUICK_SUMS(TYPE, NAME)                                                                    \
    QUICK_SUM(TYPE, NAME, magnitudes, MAGNITUDE)                                                  \
    QUICK_SUM(TYPE, NAME, squares, SQUARE)

QUICK_SUMS(float, float32)
QUICK_SUMS(uint16_t, bfloat16)
QUICK_SUMS(uint16_t, float16)

/* Exact sums. ---------------------------------------------------------------------------------- */

INLINE void KERNEL(to_magnitudes)(f64v *values, double order)
{
    (void)order;
    *values = (f64v)((u64v)*values & INT64_MAX);
}

INLINE void KERNEL(to_squares)(f64v *values, double order)
{
    (void)order;
    *values *= *values;
}

/* The first where the mask is all ones, else the second. */
#define CHOOSE(mask, first, second)                                                               \
    ((f64v)(((u64v)(first) & (u64v)(mask)) | ((u64v)(second) & ~(u64v)(mask))))

/* Powers to within 1e-12, in vectors, where pow() would take one number at a time:
 * log2(m) = 2 / ln(2) * atanh((m - 1) / (m + 1)), and the Taylor series of 2**y. */
INLINE void KERNEL(to_powers)(f64v *values, double order)
{
    static const double atanh_series[] = {1 / 21., 1 / 19., 1 / 17., 1 / 15., 1 / 13., 1 / 11.,
                                          1 / 9.,  1 / 7.,  1 / 5.,  1 / 3.,  1.};
    static const double exp2_series[] = {
        0x1.c3bd650fc2983p-36, 0x1.e8cac7351bb22p-32, 0x1.e4cf5158b8ec7p-28, 0x1.b5253d395e7c1p-24,
        0x1.62c0223a5c822p-20, 0x1.ffcbfc588b0c5p-17, 0x1.430912f86c786p-13, 0x1.5d87fe78a6730p-10,
        0x1.3b2ab6fba4e77p-7,  0x1.c6b08d704a0bfp-5,  0x1.ebfbdff82c58ep-3,  0x1.62e42fefa39efp-1,
        1.0};
    const uint64_t root_half = 0x3fe6a09e667f3bcd, bias = 1023ull << 52;
    f64v log = {0}, power = {0}, most = log + 1100;
    KERNEL(to_magnitudes)(values, order);
    u64v small = (u64v)(*values < 0x1p-1022);
    u64v bits = (u64v)CHOOSE(small, *values * 0x1p54, *values);
    u64v exponent = (bits - root_half + bias) >> 52; /* and 1023 */
    f64v mantissa = (f64v)(bits + bias - (exponent << 52)); /* from the root of 1/2 to that of 2 */
    f64v part = (mantissa - 1) / (mantissa + 1), square = part * part;
    for (int term = 0; term < 11; term++)
        log = log * square + atanh_series[term];
    log *= part * 0x1.71547652b82fep+1;
    log += (f64v)(exponent | 0x4330000000000000) - (0x1p52 + 1023); /* as a number behind 2**52 */
    log -= CHOOSE(small, power + 54, power);
    log *= order;
    log = CHOOSE(log < -most, -most, CHOOSE(log > most, most, log));
    f64v whole = log + 0x1.8p52; /* rounds to a whole number, kept in the last bits */
    f64v rest = log - (whole - 0x1.8p52);
    for (int term = 0; term < 13; term++)
        power = power * rest + exp2_series[term];
    /* In two factors, since the exponent of a denormal result does not fit into one. */
    u64v steps = ((u64v)whole + 2 * 1100) & 0xffff, half = steps >> 1;
    power *= (f64v)((half + (1023 - 1100)) << 52);
    power *= (f64v)((steps - half + (1023 - 1100)) << 52);
    *values = CHOOSE((*values > 0) & (*values < INFINITY), power, *values);
}

#define ADD_EXACT(NAME, WHAT, x, order, sums)                                                     \
    do {                                                                                          \
        f64v values[4];                                                                           \
        KERNEL(read_wide_##NAME)(x, values);                                                      \
        for (int part = 0; part < 4; part++) {                                                    \
            KERNEL(to_##WHAT)(values + part, order);                                              \
            sums[part] += values[part];                                                           \
        }                                                                                         \
    } while (0)

#define EXACT_SUM(TYPE, NAME, WHAT)                                                               \
    FUNCTION double KERNEL(WHAT##_##NAME)(const void *data, int64_t n, double order)              \
    {                                                                                             \
        const TYPE *x = data;                                                                     \
        TYPE rest[PAIR] = {0};                                                                    \
        f64v sums[4] = {{0}};                                                                     \
        for (; n >= PAIR; n -= PAIR, x += PAIR)                                                   \
            ADD_EXACT(NAME, WHAT, x, order, sums);                                                \
        memcpy(rest, x, (size_t)n * sizeof *x);                                                   \
        ADD_EXACT(NAME, WHAT, rest, order, sums);                                                 \
        return added(sums);                                                                       \
    }

#define EXACT_SUMS(TYPE, NAME)                                                                    \
    EXACT_SUM(TYPE, NAME, magnitudes)                                                             \
    EXACT_SUM(TYPE, NAME, squares)                                                                \
    EXACT_SUM(TYPE, NAME, powers)

EXACT_SUMS(float, float32)
EXACT_SUMS(double, float64)
EXACT_SUMS(uint16_t, bfloat16)
EXACT_SUMS(uint16_t, float16)

/* The largest magnitude, by bits: NaN is above infinity, and no denormal is flushed. ----------- */

#define LARGEST(TYPE, NAME, BITS, MAGNITUDE_BITS)                                                 \
    FUNCTION double KERNEL(largest_##NAME)(const void *data, int64_t n)                           \
    {                                                                                             \
        const BITS *x = data;                                                                     \
        BITS largest = 0;                                                                         \
        TYPE some[PAIR] = {0};                                                                    \
        f64v wide[4];                                                                             \
        for (int64_t place = 0; place < n; place++) {                                             \
            BITS bits = (BITS)(x[place] & MAGNITUDE_BITS);                                        \
            largest = bits > largest ? bits : largest;                                            \
        }                                                                                         \
        memcpy(some, &largest, sizeof largest);                                                   \
        KERNEL(read_wide_##NAME)(some, wide);                                                     \
        return wide[0][0];                                                                        \
    }

LARGEST(float, float32, int32_t, INT32_MAX)
LARGEST(double, float64, int64_t, INT64_MAX)
LARGEST(uint16_t, bfloat16, int16_t, INT16_MAX)
LARGEST(uint16_t, float16, int16_t, INT16_MAX)

/* Scaling. ------------------------------------------------------------------------------------- */

/* A product in float64, since a denormal float32 coefficient would be less exact. */
INLINE void KERNEL(multiply_by_tiny)(f32v *values, double coefficient)
{
    float lanes[LANES];
    memcpy(lanes, values, sizeof lanes);
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = (float)(lanes[lane] * coefficient);
    memcpy(values, lanes, sizeof lanes);
}

INLINE void KERNEL(multiply)(f32v *values, double coefficient)
{
    *values *= (float)coefficient;
}

#define SCALE_BY(TYPE, NAME, MULTIPLY)                                                            \
    INLINE void KERNEL(MULTIPLY##_pair_##NAME)(TYPE *x, double coefficient)                       \
    {                                                                                             \
        f32v one, other;                                                                          \
        KERNEL(read_##NAME)(x, &one, &other);                                                     \
        KERNEL(MULTIPLY)(&one, coefficient);                                                      \
        KERNEL(MULTIPLY)(&other, coefficient);                                                    \
        KERNEL(write_##NAME)(x, &one, &other);                                                    \
    }                                                                                             \
    FUNCTION void KERNEL(MULTIPLY##_all_##NAME)(TYPE *x, int64_t n, double coefficient)           \
    {                                                                                             \
        TYPE rest[PAIR] = {0};                                                                    \
        for (; n >= PAIR; n -= PAIR, x += PAIR)                                                   \
            KERNEL(MULTIPLY##_pair_##NAME)(x, coefficient);                                       \
        memcpy(rest, x, (size_t)n * sizeof *x);                                                   \
        KERNEL(MULTIPLY##_pair_##NAME)(rest, coefficient);                                        \
        memcpy(x, rest, (size_t)n * sizeof *x);                                                   \
    }

#define SCALE(TYPE, NAME)                                                                         \
    SCALE_BY(TYPE, NAME, multiply)                                                                \
    SCALE_BY(TYPE, NAME, multiply_by_tiny)                                                        \
    FUNCTION void KERNEL(scale_##NAME)(void *data, int64_t n, double coefficient)                 \
    {                                                                                             \
        if (coefficient < SMALLEST_NORMAL)                                                        \
            KERNEL(multiply_by_tiny_all_##NAME)(data, n, coefficient);                            \
        else                                                                                      \
            KERNEL(multiply_all_##NAME)(data, n, coefficient);                                    \
    }

SCALE(float, float32)
SCALE(uint16_t, bfloat16)
SCALE(uint16_t, float16)

FUNCTION void KERNEL(scale_float64)(void *data, int64_t n, double coefficient)
{
    double *x = data;
    for (int64_t place = 0; place < n; place++)
        x[place] *= coefficient;
}

/* Clamping, by bits as well: a NaN is above the bits of infinity, and stays. ------------------- */

#define LIMIT(NAME, TYPE, MAGNITUDE_BITS)                                                         \
    FUNCTION int KERNEL(exceeds_##NAME)(                                                          \
        const void *data, int64_t n, int64_t bound, int64_t infinity)                             \
    {                                                                                             \
        const TYPE *x = data, least = (TYPE)bound, most = (TYPE)infinity;                         \
        TYPE found = 0;                                                                           \
        for (int64_t place = 0; place < n; place++) {                                             \
            TYPE bits = (TYPE)(x[place] & MAGNITUDE_BITS);                                        \
            found = (TYPE)(found | ((bits > least) & (bits <= most)));                            \
        }                                                                                         \
        return found != 0;                                                                        \
    }                                                                                             \
    FUNCTION void KERNEL(limit_##NAME)(                                                           \
        void *data, int64_t n, int64_t bound, int64_t infinity)                                   \
    {                                                                                             \
        TYPE *x = data, least = (TYPE)bound, most = (TYPE)infinity;                               \
        for (int64_t place = 0; place < n; place++) {                                             \
            TYPE bits = (TYPE)(x[place] & MAGNITUDE_BITS);                                        \
            TYPE limited = (TYPE)((x[place] & ~MAGNITUDE_BITS) | least);                          \
            x[place] = ((bits > least) & (bits <= most)) ? limited : x[place];                    \
        }                                                                                         \
    }

LIMIT(2, int16_t, INT16_MAX)
LIMIT(4, int32_t, INT32_MAX)
LIMIT(8, int64_t, INT64_MAX)

/* The table of one instruction set. ------------------------------------------------------------ */

#define KERNELS(NAME, BYTES, INFINITY_BITS, QUICK_MAGNITUDES, QUICK_SQUARES)                      \
    {                                                                                             \
        .size = BYTES,                                                                            \
        .infinity = INFINITY_BITS,                                                                \
        .magnitudes = KERNEL(magnitudes_##NAME),                                                  \
        .squares = KERNEL(squares_##NAME),                                                        \
        .powers = KERNEL(powers_##NAME),                                                          \
        .quick_magnitudes = QUICK_MAGNITUDES,                                                     \
        .quick_squares = QUICK_SQUARES,                                                           \
        .largest = KERNEL(largest_##NAME),                                                        \
        .scale = KERNEL(scale_##NAME),                                                            \
        .exceeds = KERNEL(exceeds_##BYTES),                                                       \
        .limit = KERNEL(limit_##BYTES),                                                           \
    }

#define QUICK_KERNELS(NAME, BYTES, INFINITY_BITS)                                                 \
    KERNELS(NAME, BYTES, INFINITY_BITS, KERNEL(quick_magnitudes_##NAME),                          \
            KERNEL(quick_squares_##NAME))

static const struct kernels KERNEL(kernels)[] = {
    [FLOAT32] = QUICK_KERNELS(float32, 4, 0x7f800000),
    [FLOAT64] = KERNELS(float64, 8, 0x7ff0000000000000, NULL, NULL),
    [BFLOAT16] = QUICK_KERNELS(bfloat16, 2, 0x7f80),
    [FLOAT16] = QUICK_KERNELS(float16, 2, 0x7c00),
};
