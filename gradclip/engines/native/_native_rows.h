/* Clipping of rows to thresholds in proportion to the norms of their weights.
 *
 * A row and its weights are read once, and the row is scaled while it is in cache. A row longer than
 * a piece is measured by several threads, and scaled when all of its pieces are.
 */

/* Filled by engine.py, in this order: factor * max(norm of the weights, eps), from floor to cap. */
struct limit {
    double factor, eps, floor, cap;
};

struct pairing {
    struct job weights;
    const struct limit *limit;
    double *norms, *thresholds, *coefficients; /* one for each row */
    int erase;                                 /* rows that are not finite become 0 */
    int write;
};

/* From power sums to the coefficient. NaN compares false: a threshold of NaN limits nothing. */
static void settle(const struct pairing *pair, int64_t place, double sum, double weight_sum)
{
    const struct limit *limit = pair->limit;
    double norm = root(sum, pair->weights.order), usual = 1;
    double threshold = root(weight_sum, pair->weights.order);
    threshold = limit->factor * (threshold < limit->eps ? limit->eps : threshold);
    threshold = threshold < limit->floor ? limit->floor : threshold;
    threshold = threshold > limit->cap ? limit->cap : threshold;
    if (norm > threshold)
        usual = threshold / norm;
    pair->norms[place] = norm;
    pair->thresholds[place] = threshold;
    pair->coefficients[place] = norm < INFINITY ? usual : !pair->erase;
}

static void clip_row(struct job *job, int64_t tensor, int64_t row, int64_t place)
{
    struct pairing *pair = job->pairing;
    double sum = whole_row(job, tensor, row, place);
    settle(pair, place, sum, whole_row(&pair->weights, tensor, row, place));
    char *data = address_of(job, tensor, row);
    if (pair->write && scale_piece(job, data, job->lengths[tensor], place))
        keep(job, tensor, place, 1);
}

static int clip_long_rows(struct job job)
{
    struct pairing *pair = job.pairing;
    struct job sums = job, weight_sums = pair->weights;
    job.which = sums.which = weight_sums.which = LONG_ROWS;
    job.pairing = sums.pairing = NULL;
    job.work_on_row = sums.work_on_row = keep_row;
    measure(&sums, pair->norms);
    measure(&weight_sums, pair->thresholds);
    int status = run(&sums) == OK ? run(&weight_sums) : NO_ADDRESS;
    int64_t place = 0;
    for (int64_t tensor = 0; status == OK && tensor < job.count; tensor++)
        for (int64_t row = 0; row < rows_of(&job, tensor); row++, place++)
            if (is_chosen(&job, tensor))
                settle(pair, place, pair->norms[place], pair->thresholds[place]);
    job.work = scale_piece;
    return status == OK && pair->write ? run(&job) : status;
}

/* The number of rows; 0 if the requests differ in it, or in the lengths of rows. */
EXPORTED int64_t gradclip_rows(const struct request *gradients, const struct request *weights)
{
    struct job one = job_of(gradients), other = job_of(weights);
    int64_t rows = 0;
    if (one.count != other.count)
        return 0;
    for (int64_t tensor = 0; tensor < one.count; tensor++) {
        if (one.lengths[tensor] != other.lengths[tensor] ||
            rows_of(&one, tensor) != rows_of(&other, tensor))
            return 0;
        rows += rows_of(&one, tensor);
    }
    return rows;
}

/* Scale each row to its threshold, if `write`. Returns three numbers for each row, the norms first,
 * then the thresholds and the coefficients, and sets `written` for each tensor written. The requests
 * have the same rows. */
EXPORTED int gradclip_clip_rows(
    const struct request *gradients, const struct request *weights, const struct limit *limit,
    int erase, int write, double *results, char *written)
{
    struct job job = job_of(gradients);
    struct pairing pair = {
        .weights = job_of(weights), .limit = limit, .erase = erase, .write = write};
    int64_t rows = gradclip_rows(gradients, weights), most = 0;
    if (!results)
        return NO_ADDRESS;
    for (int64_t tensor = 0; tensor < job.count; tensor++)
        most = job.lengths[tensor] > most ? job.lengths[tensor] : most;
    pair.norms = results;
    pair.thresholds = results + rows;
    pair.coefficients = results + 2 * rows;
    measure(&pair.weights, NULL);
    measure(&job, NULL);
    job.work_on_row = clip_row;
    job.pairing = &pair;
    job.which = SHORT_ROWS;
    job.numbers = pair.coefficients;
    job.written = written;
    control before = GET_CONTROL();
    SET_CONTROL(USUAL);
    int status = run(&job);
    if (status == OK && most > CHUNK)
        status = clip_long_rows(job);
    SET_CONTROL(before);
    return status;
}
