/* Stands for libcuda.so.1 and libcudart.so.13: memory is the CPU's, everything is synchronous, kernels are C functions.
 *
 * A "fatbin" is the path of a shared library that nvcc.py made; it has a function emulate_<kernel>(dimensions, arguments) for
 * every kernel. Of NVIDIA's interfaces only what TVM's CUDA runtime calls is here.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500 };

typedef struct {
    unsigned grid[3], block[3]; /* the first fields of CUlaunchConfig */
} Launch;
typedef void (*Kernel)(const unsigned *dimensions, void **arguments);

/* The driver. */
int cuGetErrorName(int error, const char **text) { *text = "CUDA_ERROR_EMULATED"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "error of the emulated driver"; return SUCCESS; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "emulated"); return SUCCESS; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
int cuModuleLoadData(void **module, const void *path) {
    *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (*module == NULL) fprintf(stderr, "emulated driver: %s\n", dlerror());
    return *module == NULL ? INVALID_VALUE : SUCCESS;
}
int cuModuleUnload(void *module) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    char symbol[1024];
    snprintf(symbol, sizeof symbol, "emulate_%s", name);
    *function = dlsym(module, symbol);
    return *function == NULL ? NOT_FOUND : SUCCESS;
}
int cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
    const unsigned dimensions[6] = {launch->grid[0],  launch->grid[1],  launch->grid[2],
                                    launch->block[0], launch->block[1], launch->block[2]};
    if (dimensions[3] * dimensions[4] * dimensions[5] > 1024) return INVALID_VALUE;
    ((Kernel)function)(dimensions, arguments);
    return SUCCESS;
}

/* The runtime library. */
int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaSetDevice(int device) { return device == 0 ? SUCCESS : INVALID_VALUE; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 0) return INVALID_VALUE;
    *value = attribute == 1 ? 1024 : attribute == 10 ? 32 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return SUCCESS;
}
int cudaGetDeviceProperties(void *properties, int device) { return INVALID_VALUE; }
int cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    if (*memory != NULL) memset(*memory, 0xA5, size); /* a GPU's memory is not zero either */
    return *memory == NULL ? 2 : SUCCESS;
}
int cudaFree(void *memory) { free(memory); return SUCCESS; }
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)1 << 32; return SUCCESS; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, void *stream) {
    memcpy(to, from, size);
    return SUCCESS;
}
const char *cudaGetErrorName(int error) { return "cudaErrorEmulated"; }
const char *cudaGetErrorString(int error) { return "error of the emulated runtime"; }
int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }
int cudaStreamCreate(void **stream) { *stream = NULL; return SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = NULL; return SUCCESS; }
int cudaStreamDestroy(void *stream) { return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return SUCCESS; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
int cudaStreamBeginCapture(void *stream, int mode) { return INVALID_VALUE; }
int cudaStreamEndCapture(void *stream, void **graph) { return INVALID_VALUE; }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return INVALID_VALUE; }
int cudaGraphLaunch(void *executable, void *stream) { return INVALID_VALUE; }
int cudaGraphDestroy(void *graph) { return SUCCESS; }
int cudaGraphExecDestroy(void *executable) { return SUCCESS; }
int cudaEventCreate(void **event) { *event = NULL; return SUCCESS; }
int cudaEventDestroy(void *event) { return SUCCESS; }
int cudaEventRecord(void *event, void *stream) { return SUCCESS; }
int cudaEventSynchronize(void *event) { return SUCCESS; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *stop) { *milliseconds = 1; return SUCCESS; }
