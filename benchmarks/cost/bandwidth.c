/* Reads memory and does next to nothing with it: as fast as this machine can. */

#include <pthread.h>
#include <stdint.h>

typedef uint64_t words __attribute__((vector_size(64)));

struct part {
    const words *first;
    int64_t count;
    uint64_t found;
};

static void *read_part(void *given)
{
    struct part *part = given;
    words a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t place = 0; place + 4 <= part->count; place += 4) {
        a ^= part->first[place];
        b ^= part->first[place + 1];
        c ^= part->first[place + 2];
        d ^= part->first[place + 3];
    }
    a ^= b ^ c ^ d;
    part->found = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    return 0;
}

/* Read bytes that begin at a multiple of 64, on so many threads; returns what depends on them. */
uint64_t read_memory(const void *data, int64_t bytes, int threads)
{
    struct part parts[64];
    pthread_t running[64];
    uint64_t found = 0;
    int64_t each = bytes / 64 / threads;
    for (int thread = 0; thread < threads; thread++) {
        parts[thread] = (struct part){(const words *)data + thread * each, each, 0};
        pthread_create(running + thread, 0, read_part, parts + thread);
    }
    for (int thread = 0; thread < threads; thread++) {
        pthread_join(running[thread], 0);
        found ^= parts[thread].found;
    }
    return found;
}
