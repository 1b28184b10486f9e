/* A main for fuzzers without a fuzzing engine: feeds every file of a corpus folder, then seeded mutations of them.
 * usage: fuzz_<name> CORPUS [MUTATIONS [SEED]]; the seed is printed, so that a failure can be repeated. */
#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { BYTES_MAX = 1 << 16, FILES_MAX = 256 };

static struct {
    uint8_t *data;
    size_t bytes;
} files[FILES_MAX];
static int file_count;

static uint64_t random_next(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void load(const char *folder, const char *name)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f || file_count == FILES_MAX) {
        fprintf(stderr, "%s: cannot be read, or too many files\n", path);
        exit(1);
    }
    files[file_count].data = malloc(BYTES_MAX);
    if (!files[file_count].data)
        exit(1);
    files[file_count].bytes = fread(files[file_count].data, 1, BYTES_MAX, f);
    file_count++;
    fclose(f);
}

static size_t mutate(uint8_t *data, size_t bytes, uint64_t *state)
{
    static const uint8_t edges[] = {0, 1, 0x7f, 0x80, 0xff, 0x40};
    uint64_t edits = 1 + random_next(state) % 8;
    for (uint64_t i = 0; i < edits && bytes; i++) {
        uint64_t r = random_next(state);
        size_t at = r % bytes;
        if (r >> 62 == 0)
            data[at] ^= (uint8_t)(1u << (r >> 32) % 8);
        else if (r >> 62 == 1)
            data[at] = edges[(r >> 32) % sizeof(edges)];
        else if (r >> 62 == 2)
            data[at] = (uint8_t)(r >> 40);
        else
            memset(data + at, edges[(r >> 32) % sizeof(edges)], bytes - at < 8 ? bytes - at : 8);
    }
    return random_next(state) % 16 ? bytes : random_next(state) % (bytes + 1);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s CORPUS [MUTATIONS [SEED]]\n", argv[0]);
        return 2;
    }
    uint64_t mutations = argc > 2 ? strtoull(argv[2], NULL, 0) : 100000;
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    DIR *d = opendir(argv[1]);
    if (!d) {
        perror(argv[1]);
        return 1;
    }
    for (struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.')
            load(argv[1], e->d_name);
    closedir(d);
    if (!file_count) {
        fprintf(stderr, "%s: the corpus is empty\n", argv[1]);
        return 1;
    }
    for (int i = 0; i < file_count; i++)
        LLVMFuzzerTestOneInput(files[i].data, files[i].bytes);
    uint8_t *work = malloc(BYTES_MAX);
    if (!work)
        return 1;
    uint64_t state = seed;
    for (uint64_t i = 0; i < mutations; i++) {
        int f = (int)(random_next(&state) % (uint64_t)file_count);
        memcpy(work, files[f].data, files[f].bytes);
        LLVMFuzzerTestOneInput(work, mutate(work, files[f].bytes, &state));
    }
    printf("%d files, %" PRIu64 " mutations, seed %" PRIu64 "\n", file_count, mutations, seed);
    free(work);
    for (int i = 0; i < file_count; i++)
        free(files[i].data);
    return 0;
}
