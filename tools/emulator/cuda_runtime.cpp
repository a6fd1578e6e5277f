// A stand-in for libcudart: it gives the library's CUDA objects a device, which is tools/emulator/cuda.py.
//
// It implements what launchers of kernels usually call. Any other function fails to link and names itself. What is
// legal but not emulated is refused: the call fails, and Python raises the reason. The toolkit's headers declare the
// functions, so the compiler checks the signatures.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "native/tensor_map.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The device, as Python describes it. The callbacks return a cudaError_t, which the caller of the runtime gets.
struct mk_emulator {
  int (*launch)(const char* kernel, const uint32_t* grid, const uint32_t* block, uint64_t shared,
                void* const* arguments);
  int (*static_shared)(const char* kernel, int64_t* bytes);
  int (*check_range)(const void* begin, uint64_t bytes);  // fails unless all of it is the library's to use
  void (*refuse)(const char* why);
  uint64_t stream;  // the only one that work may be given to
  int64_t device;   // the ordinal; CPU tensors have -1
  int64_t major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor;
};

namespace {

mk_emulator device;
thread_local cudaError_t last_error = cudaSuccess;

constexpr int64_t default_shared = 48 * 1024, reserved_shared = 1024;  // per block; more must be asked for

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

__attribute__((format(printf, 1, 2))) cudaError_t refuse(const char* format, ...) {
  char why[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(why, sizeof why, format, arguments);
  va_end(arguments);
  device.refuse(why);
  return result(cudaErrorNotSupported);
}

// ---- Kernels: the objects register theirs when the library is loaded ----

struct Kernel {
  const char* name;
  int64_t dynamic_shared = -1;  // what cudaFuncSetAttribute allowed
};

// Constructors of other files call these, so the tables must exist before the first of them.
std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> table;
  return table;
}

Kernel* find(const void* host_function) {
  auto found = kernels().find(host_function);
  return found == kernels().end() ? nullptr : &found->second;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t check_stream(const char* function, cudaStream_t stream) {
  if ((uint64_t)stream == device.stream) return cudaSuccess;
  return refuse("%s on stream 0x%llx, but the caller's stream is 0x%llx", function, (unsigned long long)stream,
                (unsigned long long)device.stream);
}

cudaError_t launch(Kernel* kernel, const Configuration& c, void* const* arguments) {
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  const uint64_t threads = (uint64_t)c.block.x * c.block.y * c.block.z;
  if (threads == 0 || threads > 1024 || c.block.z > 64 || c.grid.x == 0 || c.grid.x > INT32_MAX || c.grid.y == 0 ||
      c.grid.y > 65535 || c.grid.z == 0 || c.grid.z > 65535) {
    return result(cudaErrorInvalidConfiguration);
  }
  int64_t fixed = 0;
  if (int error = device.static_shared(kernel->name, &fixed)) return result((cudaError_t)error);
  const int64_t allowed = kernel->dynamic_shared < 0 ? default_shared - fixed : kernel->dynamic_shared;
  if ((int64_t)c.shared > allowed) return result(cudaErrorInvalidValue);
  if (cudaError_t error = check_stream(kernel->name, c.stream)) return error;
  const uint32_t grid[3] = {c.grid.x, c.grid.y, c.grid.z}, block[3] = {c.block.x, c.block.y, c.block.z};
  return result((cudaError_t)device.launch(kernel->name, grid, block, c.shared, arguments));
}

bool on_device(const void* p, size_t bytes) { return device.check_range(p, bytes) == cudaSuccess; }

}  // namespace

EXPORTED void mk_emulator_connect(const mk_emulator* connected) { device = *connected; }
EXPORTED const char* mk_emulator_unread_error(void) { return cudaGetErrorName(cudaGetLastError()); }  // and forgets it

// ---- What nvcc generates calls of; no header for host code declares it ----

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { delete handle; }

void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host_function] = Kernel{device_name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(cudaStream_t*)stream = c.stream;
  return cudaSuccess;
}

// CUDA 13 launches through these two, CUDA 12 through cudaLaunchKernel.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = (cudaKernel_t)find(host_function);
  return *kernel ? cudaSuccess : result(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch((Kernel*)kernel, {grid, block, shared, stream}, arguments);
}

}  // extern "C"

// ---- Launches ----

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(find(function), {grid, block, shared, stream}, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    const auto& cluster = a.val.clusterDim;
    const bool single = a.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z == 1;
    if (!single) return refuse("launch attribute %d (cudaLaunchAttributeID) is not emulated", (int)a.id);
  }
  return launch(find(function), {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream},
                arguments);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = find(function);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return refuse("cudaFuncSetAttribute: attribute %d is not emulated", (int)attribute);
  }
  int64_t fixed = 0;
  if (int error = device.static_shared(kernel->name, &fixed)) return result((cudaError_t)error);
  if (value < 0 || value + fixed > device.shared_per_block) return result(cudaErrorInvalidValue);
  kernel->dynamic_shared = value;
  return cudaSuccess;
}

// Threads and shared memory bound the number. Registers do too on a device, but PTX does not tell how many there are.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  Kernel* kernel = find(function);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (threads <= 0 || threads > 1024) return result(cudaErrorInvalidValue);
  int64_t fixed = 0;
  if (int error = device.static_shared(kernel->name, &fixed)) return result((cudaError_t)error);
  const int64_t by_threads = 2048 / ((threads + 31) / 32 * 32);
  const int64_t by_shared = device.shared_per_multiprocessor / (fixed + (int64_t)shared + reserved_shared);
  *blocks = (int)(by_threads < by_shared ? by_threads : by_shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- Errors ----

cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(e) \
  case e:       \
    return #e;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorInvalidConfiguration)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorInvalidDeviceFunction)
    NAME(cudaErrorNoKernelImageForDevice)
    NAME(cudaErrorSymbolNotFound)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorLaunchFailure)
#undef NAME
    default:
      return "unrecognized error code";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "on the emulator"; }

// ---- The device ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = (int)device.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) {
  return result(ordinal == device.device ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != device.device) return result(cudaErrorInvalidDevice);
  const std::pair<cudaDeviceAttr, int64_t> emulated[] = {
      {cudaDevAttrComputeCapabilityMajor, device.major},
      {cudaDevAttrComputeCapabilityMinor, device.minor},
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlock, default_shared},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_per_multiprocessor},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrWarpSize, 32},
  };
  for (const auto& [name, known] : emulated) {
    if (name != attribute) continue;
    *value = (int)known;
    return cudaSuccess;
  }
  return refuse("cudaDeviceGetAttribute: attribute %d (cudaDeviceAttr) is not emulated", (int)attribute);
}

// ---- Memory: the device's is the host's ----

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (cudaError_t error = check_stream("cudaMemsetAsync", stream)) return error;
  if (!on_device(to, bytes)) return result(cudaErrorInvalidValue);
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (cudaError_t error = check_stream("cudaMemcpyAsync", stream)) return error;
  if (kind == cudaMemcpyDefault) return refuse("cudaMemcpyAsync: cudaMemcpyDefault is not emulated");
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !on_device(to, bytes)) || (from_device && !on_device(from, bytes)))
    return result(cudaErrorInvalidValue);
  memmove(to, from, bytes);
  return cudaSuccess;
}

// ---- Functions of the driver, which the library asks the runtime for ----

namespace {

uint32_t bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;  // types that round or flush on the way, and packed ones
  }
}

CUresult not_emulated(const char* what) {
  refuse("cuTensorMapEncodeTiled: %s is not emulated", what);
  return CUDA_ERROR_NOT_SUPPORTED;
}

// The conditions are those in the comment of cuda.h.
CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  if (device.major < 9) return not_emulated("a device without tensor maps");
  if (rank > 5) return CUDA_ERROR_INVALID_VALUE;
  if (bytes_of(type) == 0) return not_emulated("this data type");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return not_emulated("interleaving");
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return not_emulated("this swizzle");
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return not_emulated("filling with NaN");

  emulator::TensorMap map;
  map.base = (uint64_t)base, map.rank = rank;
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle;  // 32, 64 or 128 bytes
  map.element = bytes_of(type);
  const uint64_t inner = (uint64_t)box[0] * map.element;
  if (rank == 0 || (uint64_t)to % 64 || map.base % 16 || inner % 16) return CUDA_ERROR_INVALID_VALUE;
  if (map.swizzle && inner > map.swizzle) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > 1ull << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (element_strides[i] == 0 || element_strides[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && element_strides[i] != 1)
      return not_emulated("a stride of elements");  // that of dimension 0 is ignored
    map.size[i] = dims[i], map.box[i] = box[i];
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    const uint64_t least = i == 0 ? dims[0] * map.element : dims[i];
    if (strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < least) return CUDA_ERROR_INVALID_VALUE;
    map.stride[i] = strides[i];
  }
  memset(to, 0, sizeof *to);
  memcpy(to, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  if (strcmp(symbol, "cuTensorMapEncodeTiled")) return refuse("the driver's function %s is not emulated", symbol);
  *function = (void*)&encode_tiled;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* found) {
  return cudaGetDriverEntryPointByVersion(symbol, function, CUDART_VERSION, flags, found);
}
