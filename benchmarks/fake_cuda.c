/* What Triton's launcher calls of libcuda, doing nothing: see fake_gpu.py. */
#include <stdint.h>

int fake_cuda_launches = 0;

/* What executes launches, if anything does; it returns 0, or sets the error's text. */
int (*fake_cuda_on_launch)(void *config, void *function, void **params) = 0;
const char *fake_cuda_error = "an error of the fake driver";

int cuLaunchKernelEx(void *config, void *function, void **params, void **extra) {
  fake_cuda_launches++;
  return fake_cuda_on_launch ? fake_cuda_on_launch(config, function, params) : 0;
}

/* The launcher asks where a pointer lies; here it lies in host memory. */
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}

/* CU_FUNC_ATTRIBUTE_*: 0 is threads a block, 3 local memory, 4 registers. */
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = 227 * 1024;
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)1;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  static uint64_t functions = 0; /* each has a handle of its own */
  *function = (void *)++functions;
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = fake_cuda_error;
  return 0;
}

int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return 0; }
int cuDriverGetVersion(int *version) { return (*version = 13000) * 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuCtxGetLimit(uint64_t *value, int limit) { return *value = 0; }
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
int cuLaunchKernel(void) { return 1; }
int cuOccupancyMaxActiveClusters(void) { return 1; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
