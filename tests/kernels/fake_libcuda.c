// A CUDA driver without a GPU: it prints what it is asked for, and checks what a real one would check.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static void *const CONTEXT = (void *)0xc0, *const LIBRARY = (void *)0x1b;
static void *const KERNEL = (void *)0x4e, *const FUNCTION = (void *)0xf0;
static __thread void *current;
static __thread int capture_mode;

__attribute__((constructor)) static void print_lines(void) { setvbuf(stdout, NULL, _IOLBF, 0); }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
  if (status) *status = *function ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuCtxGetCurrent(void **context) { *context = current; return 0; }
int cuCtxSetCurrent(void *context) { current = context; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return 0; }
int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  if (capture_mode != 2) return 900;  // a stream is captured: only a relaxed thread may load
  printf("load %.3s\n", (const char *)code + 1);
  *library = LIBRARY;
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  if (library != LIBRARY || strcmp(name, "add")) return 500;
  *kernel = KERNEL;
  return 0;
}
int cuKernelGetFunction(void **function, void *kernel) {
  if (current != CONTEXT) return 201;
  *function = FUNCTION;
  return kernel == KERNEL ? 0 : 400;
}
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  *offset = 0;
  *size = 24;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  printf("attribute %d %d\n", attribute, value);
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  if (current != CONTEXT) return 201;
  if (function != FUNCTION || extra) return 400;
  if (x > 1000) return 1;
  struct { uint64_t a, b; int n; float f; } argument;
  memcpy(&argument, parameters[0], sizeof argument);
  printf("launch %u %u %u threads %u %u %u shared %u stream %p: %lu %lu %d %g\n", x, y, z, threads, b, c, shared, stream,
         argument.a, argument.b, argument.n, argument.f);
  return 0;
}
