/* Addresses and lengths of a list of torch tensors, in one call.
 *
 * Nothing is linked to Python or torch: engine.py hands over the functions of the interpreter's
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

/* Filled by engine.py, in this order. */
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

/* Whether all addresses of tensors with elements differ; -1 without memory to find out. */
static int are_distinct(const int64_t *addresses, const int64_t *lengths, int64_t count)
{
    enum { FEW = 32 };
    if (count <= FEW) {
        for (int64_t one = 1; one < count; one++)
            for (int64_t other = 0; other < one; other++)
                if (lengths[one] && lengths[other] && addresses[one] == addresses[other])
                    return 0;
        return 1;
    }
    uint64_t size = 2 * FEW;
    while (size < 4 * (uint64_t)count)
        size *= 2;
    uint64_t *seen = calloc(size, sizeof *seen); /* a hash table, a quarter full at most */
    int distinct = seen ? 1 : -1;
    for (int64_t tensor = 0; distinct == 1 && tensor < count; tensor++) {
        uint64_t address = (uint64_t)addresses[tensor];
        uint64_t place = (address >> 4) * 0x9e3779b97f4a7c15u >> 20 & (size - 1);
        if (!lengths[tensor])
            continue;
        while (seen[place] && seen[place] != address)
            place = (place + 1) & (size - 1);
        distinct = !seen[place];
        seen[place] = address;
    }
    free(seen);
    return distinct;
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
    int distinct = are_distinct(addresses, lengths, count);
    return distinct < 0 ? NO_MEMORY : distinct ? OK : NO_ADDRESS;
}
