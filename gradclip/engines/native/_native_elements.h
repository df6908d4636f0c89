/* Conversion of elements of every dtype to float32 or float64 vectors and back.
 *
 * PAIR elements are read and written at a time, in the same order in every instruction set. Writing
 * rounds to nearest even, and NaN stays NaN.
 */

/* All ones where a number is above a limit, both below 2**31. Not a comparison: compilers for
 * narrower registers would take that apart into single numbers. */
#define ABOVE(bits, limit) ((u32v)((i32v)((limit) - (bits)) >> 31))

/* Reading two vectors from PAIR elements. ------------------------------------------------------ */

INLINE void KERNEL(read_float32)(const float *x, f32v *one, f32v *other)
{
    memcpy(one, x, sizeof *one);
    memcpy(other, x + LANES, sizeof *other);
}

INLINE void KERNEL(read_bfloat16)(const uint16_t *x, f32v *one, f32v *other)
{
    u32v pairs; /* a bfloat16 is the upper half of a float32 */
    memcpy(&pairs, x, sizeof pairs);
    *one = (f32v)(pairs << 16);
    *other = (f32v)(pairs & 0xffff0000u);
}

#ifdef WITH_F16C
INLINE void KERNEL(read_float16)(const uint16_t *x, f32v *one, f32v *other)
{
#ifdef WITH_AVX512
    *one = (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
    *other = (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x + 1));
#else
    const __m128i *eighths = (const __m128i *)x;
    __m256 wide[4];
    for (int part = 0; part < 4; part++)
        wide[part] = _mm256_cvtph_ps(_mm_loadu_si128(eighths + part));
    memcpy(one, wide, sizeof *one);
    memcpy(other, wide + 2, sizeof *other);
#endif
}
#else
INLINE void KERNEL(widen_float16)(const u32v *halves, f32v *out)
{
    u32v magnitude = *halves & 0x7fff, sign = (*halves & 0x8000) << 16;
    u32v normal = (magnitude << 13) + (112u << 23);
    normal += ABOVE(magnitude, 0x7bff) & (112u << 23); /* infinity and NaN */
    /* A denormal is read as 2**-14 plus a fraction, and 2**-14 is then subtracted. */
    f32v fraction = (f32v)((magnitude << 13) | (113u << 23)) - 0x1p-14f;
    u32v small = ~ABOVE(magnitude, 0x3ff);
    *out = (f32v)(((small & (u32v)fraction) | (~small & normal)) | sign);
}

INLINE void KERNEL(read_float16)(const uint16_t *x, f32v *one, f32v *other)
{
    u16v halves[2];
    u32v wide[2];
    memcpy(halves, x, sizeof halves);
    for (int part = 0; part < 2; part++)
        wide[part] = __builtin_convertvector(halves[part], u32v);
    KERNEL(widen_float16)(wide, one);
    KERNEL(widen_float16)(wide + 1, other);
}
#endif

/* Writing PAIR elements, in the order in which they were read. --------------------------------- */

INLINE void KERNEL(write_float32)(float *x, const f32v *one, const f32v *other)
{
    memcpy(x, one, sizeof *one);
    memcpy(x + LANES, other, sizeof *other);
}

/* The upper half of each result is the bfloat16. A NaN comes from a bfloat16, as no product with a
 * coefficient makes one: its lower half is 0, which rounds down, so that it stays a NaN. */
INLINE void KERNEL(round_bfloat16)(const f32v *values, u32v *out)
{
    u32v bits = (u32v)*values;
    *out = bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE void KERNEL(write_bfloat16)(uint16_t *x, const f32v *one, const f32v *other)
{
    u32v lower, upper;
    KERNEL(round_bfloat16)(one, &lower);
    KERNEL(round_bfloat16)(other, &upper);
    upper = (upper & 0xffff0000u) | (lower >> 16);
    memcpy(x, &upper, sizeof upper);
}

#ifdef WITH_F16C
INLINE void KERNEL(write_float16)(
    uint16_t *x, const f32v *one, const f32v *other)
{
#ifdef WITH_AVX512
    __m256i *halves = (__m256i *)x;
    _mm256_storeu_si256(halves, _mm512_cvtps_ph((__m512)*one, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph((__m512)*other, _MM_FROUND_TO_NEAREST_INT));
#else
    __m128i *eighths = (__m128i *)x;
    __m256 wide[4];
    memcpy(wide, one, sizeof *one);
    memcpy(wide + 2, other, sizeof *other);
    for (int part = 0; part < 4; part++)
        _mm_storeu_si128(eighths + part, _mm256_cvtps_ph(wide[part], _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
INLINE void KERNEL(round_float16)(const f32v *values, u32v *out)
{
    u32v bits = (u32v)*values, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    u32v normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    /* Added to 0.5, a number is rounded to multiples of 2**-24, the smallest float16. */
    u32v fraction = (u32v)((f32v)magnitude + 0.5f) - (126u << 23);
    u32v small = ~ABOVE(magnitude, (113 << 23) - 1);
    u32v infinite = ABOVE(magnitude, 0x7f7fffff);
    u32v nan = ABOVE(magnitude, 0x7f800000);
    u32v special = 0x7c00 | (nan & (0x200 | ((magnitude >> 13) & 0x3ff)));
    u32v finite = (small & fraction) | (~small & normal);
    *out = sign | (infinite & special) | (~infinite & finite);
}

INLINE void KERNEL(write_float16)(uint16_t *x, const f32v *one, const f32v *other)
{
    u16v halves[2];
    u32v wide[2];
    KERNEL(round_float16)(one, wide);
    KERNEL(round_float16)(other, wide + 1);
    for (int part = 0; part < 2; part++)
        halves[part] = __builtin_convertvector(wide[part], u16v);
    memcpy(x, halves, sizeof halves);
}
#endif

/* Reading in float64, which is exact. ---------------------------------------------------------- */

#define READ_WIDE(TYPE, NAME)                                                                     \
    INLINE void KERNEL(read_wide_##NAME)(const TYPE *x, f64v *out)                                \
    {                                                                                             \
        f32v pair[2];                                                                             \
        half_f32v halves[4];                                                                      \
        KERNEL(read_##NAME)(x, pair, pair + 1);                                                   \
        memcpy(halves, pair, sizeof pair);                                                        \
        for (int part = 0; part < 4; part++)                                                      \
            out[part] = __builtin_convertvector(halves[part], f64v);                              \
    }

READ_WIDE(float, float32)
READ_WIDE(uint16_t, bfloat16)
READ_WIDE(uint16_t, float16)

INLINE void KERNEL(read_wide_float64)(const double *x, f64v *out)
{
    memcpy(out, x, PAIR * sizeof *x);
}
