/* What the functions in CANN's place share: the last message, descriptions of tensors, and a call's way to Python. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DIMENSIONS = 8, MOST_ARGUMENTS = 32 };

struct tensor {
    int64_t rank, sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS], offset, dtype, places;
    void *data;
};
struct list { int64_t count; struct tensor **tensors; };
struct scalar { int64_t dtype; char value[8]; };
union argument { void *pointer; int64_t integer; double number; };
struct call { const char *name; union argument arguments[MOST_ARGUMENTS]; };

static _Thread_local char message[512];
static char soc_name[64], cann_version[64];
static int (*recorder)(struct call *, int computed);

void dsa_host_say(const char *text) { strncpy(message, text, sizeof message - 1); }

void dsa_host_begin(const char *soc, const char *cann, int (*python)(struct call *, int)) {
    strncpy(soc_name, soc, sizeof soc_name - 1);
    strncpy(cann_version, cann, sizeof cann_version - 1);
    recorder = python;
}

static int unmodelled(const char *name, int status) {
    dsa_host_say(name);
    strcat(message, " is not modelled");
    return status;
}

/* An operator is called twice: for its workspace, with its arguments, and to run, with what the first call left. */
static struct call *begun(const char *name) {
    struct call *call = calloc(1, sizeof *call);
    call->name = name;
    return call;
}

static int recorded(struct call *call, uint64_t *workspace, void **executor) {
    *workspace = 0;
    *executor = call;
    return recorder(call, 0);
}

static int computed(struct call *call) {
    int status = recorder(call, 1);
    free(call);
    return status;
}

void *aclCreateTensor(const int64_t *sizes, uint64_t rank, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage, uint64_t storage_rank, void *data) {
    struct tensor *made = calloc(1, sizeof *made);
    made->rank = (int64_t)rank;
    for (uint64_t i = 0; i < rank && i < MOST_DIMENSIONS; i++) {
        made->sizes[i] = sizes[i];
        made->strides[i] = strides[i];
    }
    made->offset = offset;
    made->dtype = dtype;
    made->places = 1;
    for (uint64_t i = 0; i < storage_rank; i++) made->places *= storage[i];
    made->data = data;
    return made;
}
int aclDestroyTensor(const void *tensor) { free((void *)tensor); return 0; }

void *aclCreateTensorList(struct tensor *const *tensors, uint64_t count) {
    struct list *made = calloc(1, sizeof *made);
    made->count = (int64_t)count;
    made->tensors = malloc(count * sizeof *tensors + 1);
    memcpy(made->tensors, tensors, count * sizeof *tensors);
    return made;
}
int aclDestroyTensorList(const struct list *list) {
    for (int64_t i = 0; i < list->count; i++) free(list->tensors[i]);
    free(list->tensors);
    free((void *)list);
    return 0;
}

void *aclCreateScalar(const void *value, int dtype) {
    struct scalar *made = calloc(1, sizeof *made);
    made->dtype = dtype;
    memcpy(made->value, value, sizeof made->value);
    return made;
}
int aclDestroyScalar(const void *scalar) { free((void *)scalar); return 0; }
