/* The native engine: power sums, scaling and clamping on the CPU, over addresses and lengths.
 *
 * Plain C, loaded by loading.py through ctypes and linked neither to Python nor to torch. The loops
 * over elements are in _native_kernels.h, the division of a call among threads in _native_work.h,
 * the clipping of rows in _native_rows.h, and the reading of a list of tensors in _native_walk.h.
 * Functions return OK, CHANGED if that says what they wrote, or an error before they have written
 * anything.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Pairs of 16-bit numbers are read as little-endian words."
#endif

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

enum { ABI = 7 }; /* increase it with every change of a function that Python calls */
enum { OK = 0, CHANGED = 1, NO_MEMORY = -1, NO_ADDRESS = -2, LOW_ADDRESS = -3 };
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum {
    CHUNK = 16384,      /* elements of a piece of work */
    SHORT = 8192,       /* shorter pieces are summed in float64 at once: exact, and hardly slower */
    THREADED = 1 << 18, /* bytes below which one thread is faster than waking another */
    LANES = 16,         /* float32 numbers in a vector, on one register or several */
    PAIR = 2 * LANES,   /* elements read at once */
    BLOCK = 8 * 2 * PAIR, /* elements summed in float32 before float64: 8 for each lane */
};

#define LOWEST_ADDRESS ((int64_t)1 << 32) /* tensors without memory lie below, see layout.py */
#define SMALLEST_NORMAL 0x1p-126
#define VANISHING 0x1p-70 /* a smaller sum may have lost much in float32 */

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef float half_f32v __attribute__((vector_size(2 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));
typedef double f64v __attribute__((vector_size(4 * LANES)));
typedef uint64_t u64v __attribute__((vector_size(4 * LANES)));

/* The loops over elements of one dtype. */
struct kernels {
    int64_t size;     /* bytes of an element */
    int64_t infinity; /* its bits */
    double (*magnitudes)(const void *, int64_t, double order);
    double (*squares)(const void *, int64_t, double order);
    double (*powers)(const void *, int64_t, double order);
    double (*quick_magnitudes)(const void *, int64_t);
    double (*quick_squares)(const void *, int64_t);
    double (*largest)(const void *, int64_t);
    void (*scale)(void *, int64_t, double coefficient);
    int (*exceeds)(const void *, int64_t, int64_t bound, int64_t infinity);
    void (*limit)(void *, int64_t, int64_t bound, int64_t infinity);
};

/* The sum of all lanes, by halves, which takes short rows a third of the time of one after the other.
 * The order, and so the bits, never change. */
static double added(const f64v *sums)
{
    enum { WIDE = LANES / 2 };
    double lanes[WIDE];
    f64v total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    memcpy(lanes, &total, sizeof lanes);
    for (int half = WIDE / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* The kernels of each instruction set. --------------------------------------------------------- */

#define INLINE static inline KERNEL_TARGET
#define FUNCTION static KERNEL_TARGET

#define KERNEL(name) name##_baseline
#define KERNEL_TARGET
#include "_native_kernels.h"
#undef KERNEL
#undef KERNEL_TARGET

#if defined(__x86_64__)
#define WITH_F16C
#define KERNEL(name) name##_avx2
#define KERNEL_TARGET __attribute__((target("avx2,f16c")))
#include "_native_kernels.h"
#undef KERNEL
#undef KERNEL_TARGET

#define WITH_AVX512
#define KERNEL(name) name##_avx512
#define KERNEL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c")))
#include "_native_kernels.h"
#undef KERNEL
#undef KERNEL_TARGET
#endif

static const struct kernels *chosen = kernels_baseline;

#if defined(__x86_64__)
/* The level that processor and system have: the system must also save the wider registers.
 * __builtin_cpu_supports would be shorter, but the runtime of zig, which builds the wheels, always
 * answers no. */
static int level_of_machine(void)
{
    enum { SAVES_AVX = 0x6, SAVES_AVX512 = 0xe6 };
    const unsigned first = bit_OSXSAVE | bit_AVX | bit_F16C;
    const unsigned wider = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    unsigned a, b, c, d, saved, more;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first)
        return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(more) : "c"(0));
    if ((saved & SAVES_AVX) != SAVES_AVX || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
        return 0;
    return (saved & SAVES_AVX512) == SAVES_AVX512 && (b & wider) == wider ? 2 : 1;
}
#endif

static const struct kernels *available(int level)
{
#if defined(__x86_64__)
    int most = level_of_machine();
    if (level >= 2 && most >= 2)
        return kernels_avx512;
    if (level >= 1 && most >= 1)
        return kernels_avx2;
#endif
    (void)level;
    return kernels_baseline;
}

/* Choose the best instruction set up to a level: 0 for what every processor has, 1 for AVX2, 2 for
 * AVX-512. Returns the level chosen. */
EXPORTED int gradclip_choose(int level)
{
    chosen = available(level);
#if defined(__x86_64__)
    return chosen == kernels_avx512 ? 2 : chosen == kernels_avx2;
#else
    return 0;
#endif
}

EXPORTED int gradclip_abi(void)
{
    return ABI;
}

/* Floating-point control. ---------------------------------------------------------------------- */

/* A program may flush denormals to 0. Quick sums flush them too, since denormals are slow and far
 * below the precision of such a sum; everything else keeps them, whatever the program has set. */

#if defined(__x86_64__)
typedef unsigned int control;
enum { USUAL = 0x1f80, FLUSHING = 0x9fc0 };
#define GET_CONTROL() _mm_getcsr()
#define SET_CONTROL(value) _mm_setcsr(value)
#elif defined(__aarch64__)
typedef uint64_t control;
enum { USUAL = 0, FLUSHING = 1 << 24 };
static control GET_CONTROL(void)
{
    control value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static void SET_CONTROL(control value)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(value));
}
#else
typedef int control;
enum { USUAL, FLUSHING };
#define GET_CONTROL() USUAL
#define SET_CONTROL(value) ((void)(value))
#endif

#include "_native_work.h"
#include "_native_walk.h"

static struct job job_of(const struct request *request)
{
    const int64_t *table = request->table, count = request->count;
    return (struct job){
        .addresses = table,
        .lengths = table + count,
        .rows = request->by_rows ? table + 2 * count : NULL,
        .distances = request->by_rows ? table + 3 * count : NULL,
        .count = count,
        .threads = request->threads,
        .work_on_row = keep_row,
        .kernels = &chosen[request->dtype],
        .order = request->order,
    };
}

/* Sums. ---------------------------------------------------------------------------------------- */

static double sum_of(const struct job *job, void *piece, int64_t length, int64_t row)
{
    const struct kernels *kernels = job->kernels;
    double order = job->order;
    (void)row;
    if (order != 1 && order != 2)
        return kernels->powers(piece, length, order);
    if (length > SHORT && kernels->quick_squares) {
        SET_CONTROL(FLUSHING);
        double sum = (order == 2 ? kernels->quick_squares : kernels->quick_magnitudes)(piece, length);
        SET_CONTROL(USUAL);
        if (sum >= VANISHING && sum < INFINITY)
            return sum;
        /* Gradients of zeros are common, and need no exact sum. */
        if (sum == 0 && kernels->largest(piece, length) == 0)
            return 0;
    }
    return (order == 2 ? kernels->squares : kernels->magnitudes)(piece, length, order);
}

static double largest(const struct job *job, void *piece, int64_t length, int64_t row)
{
    (void)row;
    return job->kernels->largest(piece, length);
}

static void measure(struct job *job, double *sums)
{
    job->sums = sums;
    job->work = job->order < INFINITY ? sum_of : largest;
}

static double root(double sum, double order)
{
    return order == 1 || order == INFINITY ? sum : order == 2 ? sqrt(sum) : pow(sum, 1 / order);
}

/* The power sum of each tensor, or of each row, in float64; for infinity the largest magnitude. */
EXPORTED int gradclip_power_sums(const struct request *request, double *sums)
{
    if (!sums && request->count)
        return NO_ADDRESS;
    struct job job = job_of(request);
    measure(&job, sums);
    return run(&job);
}

/* The norm of all tensors together, not by rows; also the sum of each tensor if `wanted`. */
EXPORTED int gradclip_norm(const struct request *request, double *norm, double *wanted)
{
    enum { FEW = 64 };
    int64_t count = request->count;
    double few[FEW], total = 0, order = request->order;
    if (!norm)
        return NO_ADDRESS;
    /* The stack serves few tensors: malloc would cost as much as measuring small ones. */
    double *allocated = wanted || count <= FEW ? NULL : malloc((size_t)count * sizeof *allocated);
    double *sums = wanted ? wanted : count > FEW ? allocated : few;
    if (!sums)
        return NO_MEMORY;
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    int status = gradclip_power_sums(request, sums);
    for (int64_t tensor = 0; status == OK && tensor < count; tensor++)
        total = combined(total, sums[tensor], order);
    *norm = root(total, order);
    SET_CONTROL(before);
    free(allocated);
    return status;
}

/* Writing. ------------------------------------------------------------------------------------- */

/* Whether a product rounds to the gradient itself; those of float64 have 53 bits. */
static int changes_nothing(const struct kernels *kernels, double coefficient)
{
    return coefficient >= (kernels->size == 8 ? 1 : 1 - 0x1p-25);
}

static double scale_piece(const struct job *job, void *piece, int64_t length, int64_t row)
{
    double coefficient = ((const double *)job->numbers)[job->one_number ? 0 : row];
    if (changes_nothing(job->kernels, coefficient))
        return 0;
    if (coefficient == 0) /* also over NaN and infinity, whose product with 0 is NaN */
        memset(piece, 0, (size_t)(length * job->kernels->size));
    else
        job->kernels->scale(piece, length, coefficient);
    return 1;
}

static double limit_piece(const struct job *job, void *piece, int64_t length, int64_t row)
{
    const struct kernels *kernels = job->kernels;
    int64_t bound = ((const int64_t *)job->numbers)[job->one_number ? 0 : row];
    if (!kernels->exceeds(piece, length, bound, kernels->infinity))
        return 0;
    kernels->limit(piece, length, bound, kernels->infinity);
    return 1;
}

static int written_by(
    const struct request *request, double (*work)(const struct job *, void *, int64_t, int64_t),
    const void *numbers, int64_t number_count, char *written)
{
    if (!numbers && number_count)
        return NO_ADDRESS;
    struct job job = job_of(request);
    job.work = work;
    job.numbers = numbers;
    job.one_number = number_count == 1;
    job.written = written;
    return run(&job);
}

/* Multiply each tensor, or each row, by its coefficient in [0, 1]. A coefficient that rounds to 1
 * writes nothing, and 0 writes zeros over any element. Sets `written` for each tensor written, unless
 * it is NULL. */
EXPORTED int gradclip_scale(
    const struct request *request, const double *coefficients, int64_t count, char *written)
{
    return written_by(request, scale_piece, coefficients, count, written);
}

/* Multiply all tensors by one coefficient in [0, 1], as gradclip_scale. CHANGED unless it rounds
 * to 1. */
EXPORTED int gradclip_scale_all(const struct request *request, double coefficient)
{
    if (changes_nothing(&chosen[request->dtype], coefficient))
        return OK;
    int status = gradclip_scale(request, &coefficient, 1, NULL);
    return status == OK ? CHANGED : status;
}

/* The norm of all tensors together, then their scaling to a threshold if a finite norm is above. */
EXPORTED int gradclip_clip(const struct request *request, double threshold, double *norm)
{
    int status = gradclip_norm(request, norm, NULL);
    if (status != OK || !(*norm > threshold && *norm < INFINITY))
        return status;
    control before = GET_CONTROL();
    SET_CONTROL(USUAL); /* a program that flushes denormals would make a small quotient 0 */
    double coefficient = threshold / *norm;
    SET_CONTROL(before);
    return gradclip_scale_all(request, coefficient);
}

/* Clamp each tensor, or each row, to magnitudes whose bits are at most those of its bound. NaN
 * stays. Writes only pieces that do not fit, and sets `written` for each tensor written. */
EXPORTED int gradclip_clamp(
    const struct request *request, const int64_t *bounds, int64_t count, char *written)
{
    return written_by(request, limit_piece, bounds, count, written);
}

#include "_native_rows.h"
