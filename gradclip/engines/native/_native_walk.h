/* Addresses and lengths of a list of torch tensors, in one call.
 *
 * Nothing is linked to Python or torch: loading.py hands over the functions of the interpreter's
 * stable interface, and torch's own description of a tensor (DLPack's exchange interface, torch
 * 2.10 and later). Called with the interpreter's lock held.
 */

/* DLTensor of DLPack 1. */
struct description {
    char *data;
    int32_t device_type, device_id, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* no strides: row by row */
    uint64_t offset;          /* bytes */
};
enum { ON_CPU = 1, IS_FLOAT = 2, IS_BFLOAT = 4 };

/* Filled by loading.py, in this order. */
struct interpreter {
    int64_t (*list_size)(void *list);
    void *(*list_item)(void *list, int64_t index); /* borrowed */
    void *(*type_of)(void *object);                /* a new reference */
    void (*release)(void *object);
    void (*clear_error)(void);
    int (*describe)(void *tensor, struct description *);
    void *tensor_type, *parameter_type;
};
static struct interpreter python;

EXPORTED void gradclip_use_interpreter(const struct interpreter *functions)
{
    python = *functions;
}

static int is_plain_tensor(void *object)
{
    void *type = python.type_of(object);
    python.release(type); /* the type of a living object lives on */
    return type == python.tensor_type || type == python.parameter_type;
}

static int dtype_of(const struct description *tensor)
{
    if (tensor->lanes == 1 && tensor->code == IS_BFLOAT && tensor->bits == 16)
        return BFLOAT16;
    if (tensor->lanes != 1 || tensor->code != IS_FLOAT)
        return -1;
    switch (tensor->bits) {
    case 16: return FLOAT16;
    case 32: return FLOAT32;
    case 64: return FLOAT64;
    default: return -1;
    }
}

/* The number of elements of a tensor, or of one row from dimension 1 on; -1 unless they lie in
 * memory, in some order, without gaps or overlaps. */
static int64_t dense_length(const struct description *tensor, int32_t first)
{
    enum { MOST = 16 };
    int64_t sizes[MOST], strides[MOST], length = 1, expected = 1;
    int32_t kept = 0;
    for (int32_t place = first; place < tensor->dimensions; place++)
        length *= tensor->shape[place];
    if (!tensor->strides || !length)
        return length;
    /* From the last dimension on, sorted by strides: the usual order needs no exchange. */
    for (int32_t place = tensor->dimensions - 1; place >= first; place--) {
        if (tensor->shape[place] == 1)
            continue;
        if (kept == MOST)
            return -1;
        int32_t at = kept++;
        for (; at > 0 && strides[at - 1] > tensor->strides[place]; at--) {
            sizes[at] = sizes[at - 1];
            strides[at] = strides[at - 1];
        }
        sizes[at] = tensor->shape[place];
        strides[at] = tensor->strides[place];
    }
    for (int32_t place = 0; place < kept; place++) {
        if (strides[place] != expected)
            return -1;
        expected *= sizes[place];
    }
    return length;
}

/* The bytes between which a tensor lies. */
struct span {
    int64_t start, end;
};

/* Merge two sorted runs into one. */
static void merge(
    const struct span *one, int64_t ones, const struct span *other, int64_t others, struct span *to)
{
    while (ones && others)
        if (other->start < one->start)
            *to++ = *other++, others--;
        else
            *to++ = *one++, ones--;
    memcpy(to, ones ? one : other, (size_t)(ones + others) * sizeof *to);
}

/* Sort spans; `room` is for as many. Returns the array that holds the result. */
static struct span *sorted(struct span *spans, struct span *room, int64_t count)
{
    for (int64_t run = 1; run < count; run *= 2) {
        for (int64_t start = 0; start < count; start += 2 * run) {
            int64_t ones = run < count - start ? run : count - start;
            int64_t others = run < count - start - ones ? run : count - start - ones;
            merge(spans + start, ones, spans + start + ones, others, room + start);
        }
        struct span *result = room;
        room = spans;
        spans = result;
    }
    return spans;
}

/* Whether no two tensors, or their rows, overlap in memory; -1 without memory to find out. */
static int are_apart(const struct request *request, int64_t size)
{
    enum { FEW = 64 };
    struct span few[2 * FEW], *spans = few;
    const int64_t *addresses = request->table, count = request->count;
    const int64_t *lengths = addresses + count, *rows = lengths + count, *distances = rows + count;
    if (count > FEW && !(spans = malloc(2 * (size_t)count * sizeof *spans)))
        return -1;
    int64_t kept = 0;
    for (int64_t tensor = 0; tensor < count; tensor++) {
        int64_t length = lengths[tensor];
        if (length && request->by_rows)
            length += (rows[tensor] - 1) * distances[tensor];
        if (length)
            spans[kept++] = (struct span){addresses[tensor], addresses[tensor] + length * size};
    }
    struct span *ordered = sorted(spans, spans + kept, kept);
    int apart = 1;
    for (int64_t place = 1; apart && place < kept; place++)
        apart = ordered[place - 1].end <= ordered[place].start;
    if (spans != few)
        free(spans);
    return apart;
}

/* OK if no two tensors of a request, or their rows, overlap in memory; else NO_ADDRESS. */
EXPORTED int gradclip_apart(const struct request *request)
{
    int apart = are_apart(request, chosen[request->dtype].size);
    return apart < 0 ? NO_MEMORY : apart ? OK : NO_ADDRESS;
}

/* Write a request for the tensors of a list, or for their rows: tensors of less than two dimensions
 * have one. NO_ADDRESS, or LOW_ADDRESS, unless they are plain tensors of one dtype on the CPU, each
 * with memory of its own and without gaps in it, or in its rows. `request` has room for `count`. */
EXPORTED int gradclip_walk(
    void *list, struct request *request, int64_t count, int64_t threads, double order, int by_rows)
{
    struct description tensor;
    int64_t *addresses = request->table, *lengths = request->table + count;
    int64_t *rows = request->table + 2 * count, *distances = request->table + 3 * count;
    request->threads = threads;
    request->by_rows = by_rows;
    request->order = order;
    request->count = count;
    if (!count || !python.describe || python.list_size(list) != count)
        return NO_ADDRESS;
    for (int64_t place = 0; place < count; place++) {
        void *object = python.list_item(list, place);
        if (!is_plain_tensor(object))
            return NO_ADDRESS;
        if (python.describe(object, &tensor)) {
            python.clear_error(); /* as for a sparse tensor */
            return NO_ADDRESS;
        }
        int dtype = tensor.device_type == ON_CPU ? dtype_of(&tensor) : -1;
        int64_t address = (int64_t)(uintptr_t)tensor.data + (int64_t)tensor.offset;
        int has_rows = by_rows && tensor.dimensions > 1;
        int64_t length = dense_length(&tensor, has_rows);
        if (by_rows) {
            rows[place] = has_rows ? tensor.shape[0] : 1;
            distances[place] = !has_rows ? 0 : tensor.strides ? tensor.strides[0] : length;
            if (rows[place] > 1 && distances[place] < length)
                return NO_ADDRESS; /* rows overlap or interleave */
        }
        if (place == 0)
            request->dtype = dtype;
        if (dtype < 0 || dtype != request->dtype || length < 0)
            return NO_ADDRESS;
        if (length && address < LOWEST_ADDRESS)
            return LOW_ADDRESS; /* to be compared with the offset, which is not described */
        addresses[place] = address;
        lengths[place] = length;
    }
    return gradclip_apart(request);
}
