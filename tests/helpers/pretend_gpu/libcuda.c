/* A driver whose device memory is the machine's own: ensemble/engines/cuda.py runs on it unchanged, every address and size real.
   A thread that has not made the context current gets an error, as on a GPU; freeing what is not there aborts. */
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <stdio.h>

static __thread int current = 0;
static long allocated = 0;
#define NEEDS_CONTEXT if (!current) return 201

int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *n) {
    const char *v = getenv("PRETEND_GPUS"), *shown = getenv("CUDA_VISIBLE_DEVICES");
    int all = v ? atoi(v) : 1;
    *n = all;
    if (shown) { *n = *shown != 0; for (; *shown; shown++) *n += *shown == ','; }
    if (*n > all) *n = all;
    return 0;
}
int cuDeviceGet(int *device, int i) { int n; cuDeviceGetCount(&n); *device = i; return i >= n; }
int cuDeviceGetName(char *name, int size, int device) { const char *v = getenv("PRETEND_GPU"); snprintf(name, size, "%s", v ? v : "Pretend 9"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *v = getenv("PRETEND_SM"); int sm = v ? atoi(v) : 90;
  *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1; return 0;
}
int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { current = context == (void *)1; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { NEEDS_CONTEXT; *stream = (void *)2; return 0; }
int cuStreamSynchronize(void *stream) { NEEDS_CONTEXT; return stream == (void *)2 ? 0 : 400; }
int cuMemAlloc_v2(uint64_t *address, size_t size) { NEEDS_CONTEXT; *address = (uint64_t)malloc(size); allocated++; return *address ? 0 : 2; }
int cuMemFree_v2(uint64_t address) { NEEDS_CONTEXT; free((void *)address); allocated--; return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) { NEEDS_CONTEXT; memcpy((void *)to, from, size); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) { NEEDS_CONTEXT; memcpy(to, (void *)from, size); return 0; }
int cuEventCreate(void **event, unsigned flags) { NEEDS_CONTEXT; *event = malloc(1); return 0; }
int cuEventRecord(void *event, void *stream) { NEEDS_CONTEXT; return 0; }
int cuEventSynchronize(void *event) { NEEDS_CONTEXT; return 0; }
int cuEventElapsedTime(float *ms, void *start, void *end) { NEEDS_CONTEXT; *ms = 0.5f; return 0; }
int cuEventDestroy_v2(void *event) { NEEDS_CONTEXT; free(event); return 0; }
int cuGetErrorString(int code, const char **text) { *text = code == 201 ? "invalid device context" : "some error"; return 0; }
long pretend_allocated(void) { return allocated; }
