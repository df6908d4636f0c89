/* Gradients on the CPU: power sums, scaling and limits, over addresses and lengths.
 *
 * Plain C, loaded by native.py through ctypes: nothing here knows torch or Python. What is summed is
 * cut into pieces of CHUNK elements, and the sums of pieces are added in their order, so that
 * neither the number of threads nor their luck changes a bit. Functions return OK, or why they did
 * nothing at all.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Pairs of 16-bit numbers are read as little-endian words."
#endif

#define EXPORTED __attribute__((visibility("default")))

enum { ABI = 1 }; /* to be counted up with every change of a function that native.py calls */
enum { OK = 0, NO_MEMORY = -1, NO_ADDRESS = -2 };
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum {
    CHUNK = 16384,      /* elements of a piece of work */
    SHORT = 8192,       /* elements that are summed exactly at once */
    THREADED = 1 << 18, /* bytes below which one thread is faster than to wake another */
    LANES = 16,         /* float32 in a vector, however many registers that takes */
    PAIR = 2 * LANES,   /* elements that are read at once */
    BLOCK = 8 * 2 * PAIR,
};

#define SMALLEST_NORMAL 0x1p-126
#define VANISHING 0x1p-70 /* a smaller sum may have lost much to float32 */

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef float half_f32v __attribute__((vector_size(2 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));
typedef double f64v __attribute__((vector_size(4 * LANES)));
typedef uint64_t u64v __attribute__((vector_size(4 * LANES)));

/* What is done to elements of one dtype. */
struct kernels {
    int64_t size;     /* bytes of an element */
    int64_t infinity; /* its bits */
    double (*magnitudes)(const void *, int64_t);
    double (*squares)(const void *, int64_t);
    double (*powers)(const void *, int64_t, double order);
    double (*quick_magnitudes)(const void *, int64_t);
    double (*quick_squares)(const void *, int64_t);
    double (*largest)(const void *, int64_t);
    void (*scale)(void *, int64_t, double coefficient);
    int (*exceeds)(const void *, int64_t, int64_t bound, int64_t infinity);
    void (*limit)(void *, int64_t, int64_t bound, int64_t infinity);
};

static double added(const f64v *sums)
{
    double lanes[PAIR], sum = 0;
    memcpy(lanes, sums, sizeof lanes);
    for (int lane = 0; lane < PAIR; lane++)
        sum += lanes[lane];
    return sum;
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

static const struct kernels *available(int level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
        int wider = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return level >= 2 && wider ? kernels_avx512 : kernels_avx2;
    }
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

/* A program may flush denormals to 0. Quick sums do so too, since denormals are slow and far below
 * what they vouch for; all else keeps them. */

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

/* Work, cut into pieces. ----------------------------------------------------------------------- */

/* What native.py packs: one pointer is quicker to hand over than many numbers. */
struct request {
    int64_t dtype, threads, by_rows;
    double order; /* of a sum, else unused */
    int64_t count;
    int64_t table[]; /* count addresses, count lengths; of rows also their numbers and distances */
};

/* One call, and what is done to each piece of a row. Lengths are counted in elements. */
struct job {
    const int64_t *addresses, *lengths, *rows, *distances;
    int64_t count, threads;
    const struct kernels *kernels;
    /* Returns the sum of a piece, or whether it was written. */
    double (*work)(const struct job *, void *piece, int64_t length, int64_t row);
    double order;
    double *sums;        /* of rows; absent where pieces are written */
    const void *numbers; /* coefficients, or the bits of bounds */
    int one_number;      /* whether the first serves all rows */
    char *written;       /* for each tensor, whether it was */

    /* Of large jobs: */
    int64_t *first_unit; /* of each tensor, and how many there are in all */
    int64_t *first_row;  /* of each tensor */
    double *parts;       /* sums of pieces */
    int64_t next;        /* how many units were taken */
};

static int64_t rows_of(const struct job *job, int64_t tensor)
{
    return job->rows ? job->rows[tensor] : 1;
}

static char *address_of(const struct job *job, int64_t tensor, int64_t row)
{
    int64_t distance = job->rows ? row * job->distances[tensor] : 0;
    return (char *)(uintptr_t)job->addresses[tensor] + distance * job->kernels->size;
}

static int64_t at_most(int64_t most, int64_t number)
{
    return number < most ? number : most;
}

static double combined(double one, double other, double order)
{
    if (order < INFINITY)
        return one + other;
    return other > one || other != other ? other : one;
}

static void keep(struct job *job, int64_t tensor, int64_t row, double found)
{
    if (job->sums)
        job->sums[row] = found;
    else if (found != 0)
        __atomic_store_n(&job->written[tensor], 1, __ATOMIC_RELAXED);
}

static double work_on_row(struct job *job, int64_t tensor, int64_t row, int64_t place)
{
    char *data = address_of(job, tensor, row);
    double found = 0;
    for (int64_t left = job->lengths[tensor]; left > 0; left -= CHUNK) {
        double part = job->work(job, data, at_most(CHUNK, left), place);
        found = combined(found, part, job->order);
        data += CHUNK * job->kernels->size;
    }
    return found;
}

static void run_small(struct job *job)
{
    int64_t place = 0;
    for (int64_t tensor = 0; tensor < job->count; tensor++)
        for (int64_t row = 0; row < rows_of(job, tensor); row++, place++)
            keep(job, tensor, place, work_on_row(job, tensor, row, place));
}

/* A unit is a piece of a long row, or as many short rows as make up a piece. */

static int64_t units_in_row(const struct job *job, int64_t tensor)
{
    return (job->lengths[tensor] + CHUNK - 1) / CHUNK;
}

static int64_t rows_in_unit(const struct job *job, int64_t tensor)
{
    return CHUNK / (job->lengths[tensor] + !job->lengths[tensor]);
}

static int64_t units_of(const struct job *job, int64_t tensor)
{
    int64_t rows = rows_of(job, tensor), together = rows_in_unit(job, tensor);
    return together ? (rows + together - 1) / together : rows * units_in_row(job, tensor);
}

static void work_on_unit(struct job *job, int64_t tensor, int64_t unit)
{
    int64_t together = rows_in_unit(job, tensor), first = job->first_row[tensor];
    if (together) {
        int64_t end = at_most(rows_of(job, tensor), (unit + 1) * together);
        for (int64_t row = unit * together; row < end; row++)
            keep(job, tensor, first + row, work_on_row(job, tensor, row, first + row));
        return;
    }
    int64_t row = unit / units_in_row(job, tensor), start = unit % units_in_row(job, tensor) * CHUNK;
    char *piece = address_of(job, tensor, row) + start * job->kernels->size;
    double found = job->work(job, piece, at_most(CHUNK, job->lengths[tensor] - start), first + row);
    if (job->sums)
        job->parts[job->first_unit[tensor] + unit] = found;
    else
        keep(job, tensor, first + row, found);
}

/* What every thread does: take units until none is left. */
static void work_on_units(void *given)
{
    struct job *job = given;
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    int64_t units = job->first_unit[job->count], taken;
    while ((taken = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < units) {
        /* Writing goes backwards: what was measured last may still be in cache. */
        int64_t unit = job->sums ? taken : units - 1 - taken, low = 0, high = job->count;
        while (high - low > 1) {
            int64_t middle = low + (high - low) / 2;
            *(job->first_unit[middle] <= unit ? &low : &high) = middle;
        }
        work_on_unit(job, low, unit - job->first_unit[low]);
    }
    SET_CONTROL(before);
}

static void add_up_long_rows(struct job *job)
{
    for (int64_t tensor = 0; tensor < job->count; tensor++) {
        if (rows_in_unit(job, tensor))
            continue;
        const double *part = job->parts + job->first_unit[tensor];
        for (int64_t row = 0; row < rows_of(job, tensor); row++) {
            double sum = 0;
            for (int64_t unit = 0; unit < units_in_row(job, tensor); unit++)
                sum = combined(sum, *part++, job->order);
            job->sums[job->first_row[tensor] + row] = sum;
        }
    }
}

/* The OpenMP runtime that the program already has, found by native.py: GOMP_parallel runs a
 * function in so many threads. Its threads do not survive a fork, and a child waits for them. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static pid_t owner;

/* Null for one thread. */
EXPORTED void gradclip_use_threads_of(void *entry)
{
    memcpy(&parallel, &entry, sizeof entry);
    owner = getpid();
}

static int run_large(struct job *job)
{
    int64_t units = 0, rows = 0, count = job->count;
    for (int64_t tensor = 0; tensor < count; tensor++)
        units += units_of(job, tensor);
    job->first_unit = malloc((size_t)(2 * count + 1 + units) * sizeof *job->first_unit);
    if (!job->first_unit)
        return NO_MEMORY;
    job->first_row = job->first_unit + count + 1;
    job->parts = (double *)(job->first_row + count);
    units = 0;
    for (int64_t tensor = 0; tensor < count; tensor++) {
        job->first_unit[tensor] = units;
        job->first_row[tensor] = rows;
        units += units_of(job, tensor);
        rows += rows_of(job, tensor);
    }
    job->first_unit[count] = units;
    int64_t threads = at_most(units, job->threads);
    if (parallel && threads > 1 && getpid() == owner)
        parallel(work_on_units, job, (unsigned)threads, 0);
    else
        work_on_units(job);
    if (job->sums)
        add_up_long_rows(job);
    free(job->first_unit);
    return OK;
}

static int run(struct job *job)
{
    int64_t bytes = 0;
    for (int64_t tensor = 0; tensor < job->count; tensor++) {
        int64_t own = rows_of(job, tensor) * job->lengths[tensor] * job->kernels->size;
        if (own > 0 && !job->addresses[tensor])
            return NO_ADDRESS;
        bytes += own;
    }
    if (bytes >= THREADED)
        return run_large(job);
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    run_small(job);
    SET_CONTROL(before);
    return OK;
}

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
        .kernels = &chosen[request->dtype],
        .order = request->order,
    };
}

/* Sums. ---------------------------------------------------------------------------------------- */

static double sum_of(const struct job *job, void *piece, int64_t length, int64_t row)
{
    const struct kernels *kernels = job->kernels;
    int squares = job->order == 2;
    (void)row;
    if (length > SHORT && kernels->size < 8) {
        SET_CONTROL(FLUSHING);
        double sum = (squares ? kernels->quick_squares : kernels->quick_magnitudes)(piece, length);
        SET_CONTROL(USUAL);
        if (sum >= VANISHING && sum < INFINITY)
            return sum;
        /* Zeros are common, and quickly found. */
        if (sum == 0 && kernels->largest(piece, length) == 0)
            return 0;
    }
    return (squares ? kernels->squares : kernels->magnitudes)(piece, length);
}

static double sum_of_powers(const struct job *job, void *piece, int64_t length, int64_t row)
{
    (void)row;
    return job->kernels->powers(piece, length, job->order);
}

static double largest(const struct job *job, void *piece, int64_t length, int64_t row)
{
    (void)row;
    return job->kernels->largest(piece, length);
}

/* The power sum of each tensor, or of each row, in float64; for infinity the largest magnitude. */
EXPORTED int gradclip_power_sums(const struct request *request, double *sums)
{
    if (!sums && request->count)
        return NO_ADDRESS;
    struct job job = job_of(request);
    job.sums = sums;
    job.work = job.order == 1 || job.order == 2 ? sum_of
               : job.order == INFINITY          ? largest
                                                : sum_of_powers;
    return run(&job);
}

/* The norm of all tensors together, which are not divided into rows. */
EXPORTED int gradclip_norm(const struct request *request, double *norm)
{
    enum { FEW = 64 };
    int64_t count = request->count;
    double few[FEW], *sums = count > FEW ? malloc((size_t)count * sizeof *sums) : few;
    double total = 0, order = request->order;
    if (!sums || !norm)
        return norm ? NO_MEMORY : NO_ADDRESS;
    int status = gradclip_power_sums(request, sums);
    for (int64_t tensor = 0; status == OK && tensor < count; tensor++)
        total = combined(total, sums[tensor], order);
    if (sums != few)
        free(sums);
    if (order == 2)
        total = sqrt(total);
    else if (order != 1 && order < INFINITY)
        total = pow(total, 1 / order);
    *norm = total;
    return status;
}

/* Writing. ------------------------------------------------------------------------------------- */

static double scale_piece(const struct job *job, void *piece, int64_t length, int64_t row)
{
    double coefficient = ((const double *)job->numbers)[job->one_number ? 0 : row];
    /* Products that are the gradient itself: those of float64 are rounded to 53 bits. */
    if (coefficient >= (job->kernels->size == 8 ? 1 : 1 - 0x1p-25))
        return 0;
    if (coefficient == 0)
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

/* Multiply each tensor, or each row, by its coefficient in [0, 1]; what rounds to 1 is not touched,
 * 0 writes zeros over whatever was there. Tells of each tensor whether it was written. */
EXPORTED int gradclip_scale(
    const struct request *request, const double *coefficients, int64_t number, char *written)
{
    struct job job = job_of(request);
    job.work = scale_piece;
    job.numbers = coefficients;
    job.one_number = number == 1;
    job.written = written;
    return run(&job);
}

/* Limit each tensor, or each row, to magnitudes of which the bits are at most those of its bound;
 * NaN stays. Tells of each tensor whether it was written, which it is only where it does not fit. */
EXPORTED int gradclip_clamp(
    const struct request *request, const int64_t *bounds, int64_t number, char *written)
{
    struct job job = job_of(request);
    job.work = limit_piece;
    job.numbers = bounds;
    job.one_number = number == 1;
    job.written = written;
    return run(&job);
}
