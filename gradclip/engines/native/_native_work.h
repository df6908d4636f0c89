/* The division of a call into pieces that threads share.
 *
 * A piece is up to CHUNK elements of a row. The sums of pieces are stored and added in their order,
 * so that neither the number of threads nor their timing changes a bit.
 */

/* Packed by engine.py: ctypes passes one pointer faster than many numbers. */
struct request {
    int64_t dtype, threads, by_rows;
    double order; /* p of a sum, else unused */
    int64_t count;
    int64_t table[]; /* count addresses, count lengths; by rows also row counts and strides */
};

/* Rows that a call works on. Units of others are not made. */
enum rows { ALL_ROWS, SHORT_ROWS, LONG_ROWS };

/* One call, and the work on each piece of a row. Lengths are counted in elements. */
struct job {
    const int64_t *addresses, *lengths, *rows, *distances;
    int64_t count, threads;
    enum rows which;
    const struct kernels *kernels;
    /* Returns the sum of a piece, or 1 if it wrote the piece. */
    double (*work)(const struct job *, void *piece, int64_t length, int64_t row);
    /* Works on a row of a tensor; `place` counts the rows of all tensors. */
    void (*work_on_row)(struct job *, int64_t tensor, int64_t row, int64_t place);
    struct pairing *pairing; /* rows of weights beside these, see _native_rows.h; or NULL */
    double order;
    double *sums;        /* one for each row; NULL if the call writes */
    const void *numbers; /* coefficients, or the bits of bounds */
    int one_number;      /* the first serves all rows */
    char *written;       /* one flag for each tensor, or NULL */

    /* Large jobs only: */
    int64_t *first_unit; /* of each tensor, then their number */
    int64_t *first_row;  /* of each tensor */
    double *parts;       /* sums of pieces */
    int64_t *next;       /* unit of each thread's range, APART numbers from each other */
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
    else if (found != 0 && job->written) /* several threads may set the same flag */
        __atomic_store_n(&job->written[tensor], 1, __ATOMIC_RELAXED);
}

/* The sum of a row, or other than 0 if it was written. */
static double whole_row(const struct job *job, int64_t tensor, int64_t row, int64_t place)
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

static void keep_row(struct job *job, int64_t tensor, int64_t row, int64_t place)
{
    keep(job, tensor, place, whole_row(job, tensor, row, place));
}

static int is_chosen(const struct job *job, int64_t tensor)
{
    return job->which == ALL_ROWS || (job->lengths[tensor] > CHUNK) == (job->which == LONG_ROWS);
}

static void run_small(struct job *job)
{
    int64_t place = 0;
    for (int64_t tensor = 0; tensor < job->count; place += rows_of(job, tensor++))
        for (int64_t row = 0; is_chosen(job, tensor) && row < rows_of(job, tensor); row++)
            job->work_on_row(job, tensor, row, place + row);
}

/* A thread takes a unit at a time: a piece of a long row, or short rows that fill a piece. */

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
    if (!is_chosen(job, tensor))
        return 0;
    return together ? (rows + together - 1) / together : rows * units_in_row(job, tensor);
}

static void work_on_unit(struct job *job, int64_t unit)
{
    int64_t tensor = 0, end = job->count;
    while (end - tensor > 1) {
        int64_t middle = tensor + (end - tensor) / 2;
        *(job->first_unit[middle] <= unit ? &tensor : &end) = middle;
    }
    unit -= job->first_unit[tensor];
    int64_t together = rows_in_unit(job, tensor), first = job->first_row[tensor];
    if (together) {
        int64_t last = at_most(rows_of(job, tensor), (unit + 1) * together);
        for (int64_t row = unit * together; row < last; row++)
            job->work_on_row(job, tensor, row, first + row);
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

/* Functions of the OpenMP runtime that torch uses, found by loading.py: one that runs a function in
 * a number of threads, and the number of a thread among them. Threads do not survive a fork, and a
 * child process would wait for them for ever, so it works in one thread. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*number_of_thread)(void);
static pid_t owner;

/* A thread takes the units of its own range, then what is left of the others'. So threads read and
 * write far from each other, which memory serves faster, and each scales what it has measured, which
 * may still be in its cache. */
enum { APART = 8 }; /* a counter in each cache line: threads would wait for a line that they share */

static void work_on_units(void *given)
{
    struct job *job = given;
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    int64_t units = job->first_unit[job->count], ranges = job->threads;
    int64_t own = ranges > 1 ? number_of_thread() : 0;
    for (int64_t turn = 0; turn < ranges; turn++) {
        int64_t range = (own + turn) % ranges, end = units * (range + 1) / ranges, unit;
        int64_t *next = &job->next[range * APART];
        while ((unit = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < end)
            work_on_unit(job, unit);
    }
    SET_CONTROL(before);
}

static void add_up_long_rows(struct job *job)
{
    for (int64_t tensor = 0; tensor < job->count; tensor++) {
        if (!is_chosen(job, tensor) || rows_in_unit(job, tensor))
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

/* A call returns when all of its threads have run. Where other programs keep the cores busy, that
 * takes until the system lets the last thread run, many times longer than the work: after such a
 * call some are made in one thread, twice as many each time. */

enum { MOST_ALONE = 1024 };
static int64_t calls_alone, next_alone = 1;

/* Use the threads behind GOMP_parallel and omp_get_thread_num; NULL for one thread. */
EXPORTED void gradclip_use_threads_of(void *entry, void *number)
{
    memcpy(&parallel, &entry, sizeof entry);
    memcpy(&number_of_thread, &number, sizeof number);
    owner = getpid();
    calls_alone = 0;
    next_alone = 1;
}

/* On Windows torch brings a runtime without GOMP_parallel: Intel's, with the interface of LLVM. */
struct source_place {
    int32_t reserved, flags, more_reserved[2];
    const char *text;
};
static struct {
    void (*fork)(const struct source_place *, int32_t arguments, void *task, ...);
    void (*set_threads)(const struct source_place *, int32_t thread, int32_t threads);
    int32_t (*own_thread)(const struct source_place *);
} llvm;

static void llvm_task(int32_t *thread, int32_t *bound, void (*function)(void *), void *data)
{
    (void)thread, (void)bound;
    function(data);
}

static void llvm_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags)
{
    static const struct source_place here = {.flags = 2, .text = ";gradclip;run;0;0;;"};
    void (*task)(int32_t *, int32_t *, void (*)(void *), void *) = llvm_task;
    void *entry;
    (void)flags;
    memcpy(&entry, &task, sizeof entry);
    llvm.set_threads(&here, llvm.own_thread(&here), (int32_t)threads);
    llvm.fork(&here, 2, entry, function, data);
}

/* Use __kmpc_fork_call, __kmpc_push_num_threads, __kmpc_global_thread_num and omp_get_thread_num. */
EXPORTED void gradclip_use_llvm_threads(void *fork, void *set_threads, void *own_thread, void *number)
{
    void (*entry)(void (*)(void *), void *, unsigned, unsigned) = llvm_parallel;
    void *functions[] = {fork, set_threads, own_thread};
    memcpy(&llvm, functions, sizeof llvm);
    memcpy(functions, &entry, sizeof entry);
    gradclip_use_threads_of(functions[0], number);
}

static int threads_are_free(void)
{
    int64_t left = __atomic_load_n(&calls_alone, __ATOMIC_RELAXED);
    if (left > 0)
        __atomic_store_n(&calls_alone, left - 1, __ATOMIC_RELAXED);
    return left <= 0;
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

static void work_in_threads(struct job *job, int64_t bytes)
{
    /* Nanoseconds: a start, and for each byte several times what one thread takes. */
    enum { START = 200000, QUICK = 2, POWER = 40 };
    int measures = job->sums || job->pairing;
    int quick = !measures || job->order == 1 || job->order == 2 || job->order == INFINITY;
    int64_t began = nanoseconds();
    parallel(work_on_units, job, (unsigned)job->threads, 0);
    int had_to_wait = nanoseconds() - began > START + (quick ? QUICK : POWER) * bytes;
    int64_t alone = __atomic_load_n(&next_alone, __ATOMIC_RELAXED);
    __atomic_store_n(&calls_alone, had_to_wait ? alone : 0, __ATOMIC_RELAXED);
    __atomic_store_n(&next_alone, had_to_wait ? at_most(MOST_ALONE, 2 * alone) : 1, __ATOMIC_RELAXED);
}

static void run_large(struct job *job, int64_t bytes)
{
    int64_t units = 0, rows = 0, count = job->count;
    for (int64_t tensor = 0; tensor < count; tensor++)
        units += units_of(job, tensor);
    job->threads = at_most(units, job->threads);
    if (!parallel || job->threads < 2 || getpid() != owner || !threads_are_free())
        job->threads = 1;
    int64_t numbers = 2 * count + 1 + units + job->threads * APART;
    job->first_unit = malloc((size_t)numbers * sizeof *job->first_unit);
    if (!job->first_unit) {
        run_small(job); /* adds in the same order */
        return;
    }
    job->first_row = job->first_unit + count + 1;
    job->parts = (double *)(job->first_row + count);
    job->next = (int64_t *)(job->parts + units);
    units = 0;
    for (int64_t tensor = 0; tensor < count; tensor++) {
        job->first_unit[tensor] = units;
        job->first_row[tensor] = rows;
        units += units_of(job, tensor);
        rows += rows_of(job, tensor);
    }
    job->first_unit[count] = units;
    for (int64_t range = 0; range < job->threads; range++)
        job->next[range * APART] = units * range / job->threads;
    if (job->threads > 1)
        work_in_threads(job, bytes);
    else
        work_on_units(job);
    if (job->sums)
        add_up_long_rows(job);
    free(job->first_unit);
}

static int run(struct job *job)
{
    int64_t bytes = 0, passes = job->pairing ? 3 : 1;
    for (int64_t tensor = 0; tensor < job->count; tensor++) {
        int64_t own = rows_of(job, tensor) * job->lengths[tensor] * job->kernels->size;
        if (own > 0 && !job->addresses[tensor])
            return NO_ADDRESS;
        bytes += is_chosen(job, tensor) ? passes * own : 0;
    }
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    if (bytes >= THREADED)
        run_large(job, bytes);
    else
        run_small(job);
    SET_CONTROL(before);
    return OK;
}
