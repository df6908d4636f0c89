/* Runs the C code of the native engine without Python, for the sanitizers and for processors that
 * are emulated: every verb, around every boundary, in buffers that end where the elements do.
 *
 * Prints a checksum of all results, which no instruction set and no number of threads may change.
 * With -DSHIPPED it calls a library that was built elsewhere, loaded as ctypes would.
 */

#include "../../../gradclip/engines/native/_native.c"

#include <pthread.h>
#include <stdio.h>

#ifdef SHIPPED
#ifdef _WIN32
extern void *LoadLibraryA(const char *), *GetProcAddress(void *, const char *);
#define LOAD(path) LoadLibraryA(path)
#define FIND GetProcAddress
#else
#include <dlfcn.h>
#define LOAD(path) dlopen(path, RTLD_NOW)
#define FIND dlsym
#endif
static void *library;
#define SHIPPED_FUNCTION(name) (*(__typeof__(&name))FIND(library, #name))
#define gradclip_abi SHIPPED_FUNCTION(gradclip_abi)
#define gradclip_choose SHIPPED_FUNCTION(gradclip_choose)
#define gradclip_clamp SHIPPED_FUNCTION(gradclip_clamp)
#define gradclip_clip_rows SHIPPED_FUNCTION(gradclip_clip_rows)
#define gradclip_norm SHIPPED_FUNCTION(gradclip_norm)
#define gradclip_power_sums SHIPPED_FUNCTION(gradclip_power_sums)
#define gradclip_rows SHIPPED_FUNCTION(gradclip_rows)
#define gradclip_scale SHIPPED_FUNCTION(gradclip_scale)
#define gradclip_use_llvm_threads SHIPPED_FUNCTION(gradclip_use_llvm_threads)
#define gradclip_use_threads_of SHIPPED_FUNCTION(gradclip_use_threads_of)
#endif

static const int64_t LENGTHS[] = {
    0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 511, 512, 513, 700, 8191, 8192, 8193, 8800,
    16383, 16384, 16385, 24577, 33000, 131072, 300001,
};
enum { COUNT = sizeof LENGTHS / sizeof *LENGTHS, SHIFTS = 3, DTYPES = 4 };
static const double ORDERS[] = {1, 2, 3, 0.5, INFINITY};
static const int64_t SIZES[DTYPES] = {4, 8, 2, 2};

static uint64_t checksum;

static void note(const void *data, size_t bytes)
{
    for (size_t place = 0; place < bytes; place++)
        checksum = (checksum ^ ((const unsigned char *)data)[place]) * 1099511628211u;
}

static void demand(int held, const char *what, int dtype, int64_t length, double detail)
{
    if (held)
        return;
    fprintf(stderr, "%s: dtype %d, %lld elements, %g\n", what, dtype, (long long)length, detail);
    exit(1);
}

static uint64_t state;

static uint64_t random_bits(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static double value_of(const char *element, int dtype)
{
    float single;
    double value;
    uint16_t half;
    uint32_t bits;
    if (dtype == FLOAT64) {
        memcpy(&value, element, sizeof value);
        return value;
    }
    if (dtype == FLOAT32) {
        memcpy(&single, element, sizeof single);
        return single;
    }
    memcpy(&half, element, sizeof half);
    if (dtype == BFLOAT16) {
        bits = (uint32_t)half << 16;
        memcpy(&single, &bits, sizeof single);
        return single;
    }
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    value = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? ldexp(mantissa, -24)
                            : ldexp(1024 + mantissa, exponent - 25);
    return half & 0x8000 ? -value : value;
}

/* Ask about one tensor. */
static struct request *asked(
    const int64_t *table, int64_t by_rows, int dtype, double order, int64_t threads)
{
    static struct request *request;
    if (!request)
        request = malloc(sizeof *request + 4 * sizeof *table);
    *request = (struct request){dtype, threads, by_rows, order, 1};
    memcpy(request->table, table, 4 * sizeof *table);
    return request;
}

/* Moderate numbers, denormal ones among them, and with some a large one. */
static void fill(char *data, int64_t n, int dtype)
{
    for (int64_t place = 0; place < n; place++) {
        uint64_t bits = random_bits();
        double number = ldexp((double)(bits >> 11), -53) - 0.5;
        float single = (float)(place % 97 == 5 ? ldexp(number, -140) : number);
        uint32_t word;
        memcpy(&word, &single, sizeof word);
        uint16_t half = dtype == BFLOAT16 ? (uint16_t)(word >> 16)
                                          : (uint16_t)((bits & 0x83ff) | (bits >> 20) % 15 << 10);
        const void *source = dtype == FLOAT64   ? (const void *)&number
                             : dtype == FLOAT32 ? (const void *)&single
                                                : (const void *)&half;
        memcpy(data + place * SIZES[dtype], source, (size_t)SIZES[dtype]);
    }
}

static double naive(const char *data, int64_t n, int dtype, double order)
{
    double sum = 0, largest = 0;
    for (int64_t place = 0; place < n; place++) {
        double magnitude = fabs(value_of(data + place * SIZES[dtype], dtype));
        sum += order == INFINITY ? 0 : pow(magnitude, order);
        largest = magnitude > largest ? magnitude : largest;
    }
    return order == INFINITY ? largest : sum;
}

static int close_to(double found, double needed)
{
    return fabs(found - needed) <= 1e-6 * fabs(needed);
}

static void check(int dtype, int64_t n, int64_t shift, int threads)
{
    int64_t size = SIZES[dtype], columns = n / 5;
    char *memory = malloc((size_t)((shift + n) * size) + 1), *data = memory + shift * size;
    char *copy = malloc((size_t)(n * size) + 1), written = 0;
    int64_t whole[4] = {(int64_t)(uintptr_t)data, n};
    int64_t rows[] = {(int64_t)(uintptr_t)data, columns, 5, columns};
    double sums[5], each[5] = {1, 0.5, 0, 1e-40, 0.999};
    fill(data, n, dtype);
    memcpy(copy, data, (size_t)(n * size));
    for (size_t which = 0; which < sizeof ORDERS / sizeof *ORDERS; which++) {
        double order = ORDERS[which];
        demand(gradclip_power_sums(asked(whole, 0, dtype, order, threads), sums) == OK, "sum", dtype, n,
               order);
        demand(close_to(sums[0], naive(data, n, dtype, order)), "sum", dtype, n, order);
        note(sums, sizeof *sums);
        gradclip_norm(asked(whole, 0, dtype, order, threads), sums, NULL);
        note(sums, sizeof *sums);
        gradclip_power_sums(asked(rows, 1, dtype, order, threads), sums);
        for (int row = 0; row < 5; row++)
            demand(close_to(sums[row], naive(data + row * columns * size, columns, dtype, order)),
                   "row", dtype, n, order);
        note(sums, sizeof sums);
    }
    demand(!memcmp(copy, data, (size_t)(n * size)), "measuring wrote", dtype, n, 0);
    gradclip_scale(asked(whole, 0, dtype, 0, threads), (double[]){1}, 1, &written);
    demand(!written && !memcmp(copy, data, (size_t)(n * size)), "1 wrote", dtype, n, 0);
    gradclip_scale(asked(rows, 1, dtype, 0, threads), each, 5, &written);
    demand(written == (columns > 0), "scaled rows", dtype, n, 0);
    demand(!memcmp(copy, data, (size_t)(columns * size)), "row of 1 wrote", dtype, n, 0);
    for (int64_t place = 2 * columns; place < 3 * columns; place++)
        demand(value_of(data + place * size, dtype) == 0, "row of 0", dtype, n, 0);
    note(data, (size_t)(n * size));
    gradclip_scale(asked(whole, 0, dtype, 0, threads), (double[]){0.3}, 1, &written);
    note(data, (size_t)(n * size));
    int64_t bound[] = {dtype == FLOAT32 ? 0x3d800000 : dtype == FLOAT64 ? 0x3fb0000000000000
                       : dtype == BFLOAT16 ? 0x3d80 : 0x2c00}; /* 1 / 16 */
    gradclip_clamp(asked(whole, 0, dtype, 0, threads), bound, 1, &written);
    demand(naive(data, n, dtype, INFINITY) <= 1 / 16., "limit", dtype, n, 0);
    note(data, (size_t)(n * size));
    written = 0;
    gradclip_clamp(asked(whole, 0, dtype, 0, threads), bound, 1, &written);
    demand(!written, "what fits was written", dtype, n, 0);
    free(memory);
    free(copy);
}

/* Rows beside rows of weights that start elsewhere. */
static void check_rows(int dtype, int64_t n, int64_t shift, int threads)
{
    int64_t size = SIZES[dtype], columns = n / 5;
    char *memory = malloc((size_t)((shift + n) * size) + 1), *data = memory + shift * size;
    char *weights = malloc((size_t)(n * size) + 1), *copy = malloc((size_t)(n * size) + 1), written = 0;
    int64_t rows[] = {(int64_t)(uintptr_t)data, columns, 5, columns};
    int64_t weight_rows[] = {(int64_t)(uintptr_t)weights, columns, 5, columns};
    double results[15], measured[15];
    const struct limit limit = {0.9, 1e-3, 0, 1e6};
    fill(data, n, dtype);
    fill(weights, n, dtype);
    memcpy(copy, data, (size_t)(n * size));
    struct request *one = malloc(sizeof *one + sizeof rows), *other = malloc(sizeof *other + sizeof rows);
    memcpy(one, asked(rows, 1, dtype, 2, threads), sizeof *one + sizeof rows);
    memcpy(other, asked(weight_rows, 1, dtype, 2, threads), sizeof *other + sizeof rows);
    demand(gradclip_rows(one, other) == 5, "rows", dtype, n, 0);
    gradclip_clip_rows(one, other, &limit, 1, 0, measured, &written);
    demand(!written && !memcmp(copy, data, (size_t)(n * size)), "measuring wrote", dtype, n, 0);
    gradclip_clip_rows(one, other, &limit, 1, 1, results, &written);
    demand(!memcmp(results, measured, sizeof results), "other results", dtype, n, 0);
    for (int row = 0; row < 5; row++) {
        double norm = sqrt(naive(copy + row * columns * size, columns, dtype, 2));
        double weight_norm = sqrt(naive(weights + row * columns * size, columns, dtype, 2));
        demand(close_to(results[row], norm), "norm of a row", dtype, n, norm);
        demand(close_to(results[5 + row], 0.9 * fmax(weight_norm, 1e-3)), "limit", dtype, n, row);
        int same = !memcmp(copy + row * columns * size, data + row * columns * size,
                           (size_t)(columns * size));
        demand(same || results[10 + row] < 1, "a row below its limit was written", dtype, n, row);
    }
    note(results, sizeof results);
    note(data, (size_t)(n * size));
    free(one);
    free(other);
    free(memory);
    free(weights);
    free(copy);
}

/* As GOMP_parallel, without what it keeps, and omp_get_thread_num. */

struct call {
    void (*function)(void *);
    void *data;
    int number;
};

static _Thread_local int own_number;

static int number_of(void)
{
    return own_number;
}

static void *call(void *given)
{
    struct call *call = given;
    own_number = call->number;
    call->function(call->data);
    return NULL;
}

static void run_in_threads(void (*function)(void *), void *data, unsigned count, unsigned flags)
{
    struct call given[8];
    pthread_t threads[8];
    (void)flags;
    for (unsigned thread = 1; thread < count; thread++) {
        given[thread] = (struct call){function, data, (int)thread};
        pthread_create(threads + thread, NULL, call, given + thread);
    }
    function(data);
    for (unsigned thread = 1; thread < count; thread++)
        pthread_join(threads[thread], NULL);
}

#ifdef SHIPPED
/* The library, and where there is one the OpenMP runtime that serves in place of our threads. */
static void load(int count, char **paths)
{
    library = count > 0 ? LOAD(paths[0]) : NULL;
    demand(library != NULL, "the library was not loaded", 0, 0, 0);
    demand(gradclip_abi() == ABI, "the library has another version", 0, 0, 0);
    if (count < 2)
        return;
    void *runtime = LOAD(paths[1]);
    demand(runtime != NULL, "the runtime was not loaded", 0, 0, 0);
    gradclip_use_llvm_threads(FIND(runtime, "__kmpc_fork_call"), FIND(runtime, "__kmpc_push_num_threads"),
                              FIND(runtime, "__kmpc_global_thread_num"),
                              FIND(runtime, "omp_get_thread_num"));
}
#endif

/* An argument leaves out longer lengths: emulated processors are slow. */
int main(int count, char **arguments)
{
    int64_t longest = count > 1 ? atoll(arguments[1]) : INT64_MAX;
    uint64_t first = 0;
    void (*entry)(void (*)(void *), void *, unsigned, unsigned) = run_in_threads;
    int (*numbering)(void) = number_of;
    void *pointer, *numbers;
    memcpy(&pointer, &entry, sizeof pointer);
    memcpy(&numbers, &numbering, sizeof numbers);
#ifdef SHIPPED
    load(count - 2, arguments + 2);
    if (count < 4)
#endif
        gradclip_use_threads_of(pointer, numbers);
    for (int level = 0; level <= 2; level++)
        for (int threads = 1; threads <= 3; threads += 2) {
            if (gradclip_choose(level) != level)
                continue;
            checksum = 14695981039346656037u;
            state = 88172645463325252u;
            for (int dtype = 0; dtype < DTYPES; dtype++)
                for (int which = 0; which < COUNT && LENGTHS[which] <= longest; which++) {
                    for (int64_t shift = 0; shift < SHIFTS; shift++)
                        check(dtype, LENGTHS[which], shift, threads);
                    check_rows(dtype, LENGTHS[which], 1, threads);
                }
            printf("level %d, threads %d: ", level, threads);
            printf("%016llx\n", (unsigned long long)checksum);
            first = first ? first : checksum;
            demand(checksum == first, "other bits", level, threads, 0);
        }
    puts("ok");
    return 0;
}
