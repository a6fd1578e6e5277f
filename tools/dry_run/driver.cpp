// A CUDA runtime and driver for a GPU that computes nothing: its memory is the host's, its launches only count. Kernels
// that come as PTX can be executed: dry_run_emulate.
//
// Preloaded, it stands between PyTorch and the libraries that need a GPU. Memory is handed out and copied, so that an
// allocator's books are right; streams and events exist; while a graph is captured, what CUDA forbids then is refused.
// Symbols that are not here return 0: tools/dry_run/__main__.py makes them up from what PyTorch imports.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kMemory = size_t{80} << 30;
constexpr int kSharedMemory = 227 << 10;  // bytes that a block may ask for
constexpr unsigned kGridLimit = 65535;    // of y and z

std::recursive_mutex mutex;
std::map<char*, size_t> device_memory, pinned_memory;
std::map<const void*, std::string> kernel_names;
std::map<std::string, long> calls;
cudaStream_t capturing_stream;
std::atomic<bool> capturing{false};
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

using Lock = std::lock_guard<std::recursive_mutex>;

void count(const std::string& what) {
  Lock lock(mutex);
  ++calls[what];
}

bool holds(const std::map<char*, size_t>& memory, const void* address) {
  Lock lock(mutex);
  auto* byte = static_cast<char*>(const_cast<void*>(address));
  auto next = memory.upper_bound(byte);
  return next != memory.begin() && byte < std::prev(next)->first + std::prev(next)->second;
}

size_t used_memory() {
  Lock lock(mutex);
  size_t used = 0;
  for (const auto& [address, size] : device_memory) used += size;
  return used;
}

// What CUDA forbids while a graph is captured.
cudaError_t forbidden(const char* what) {
  count(what);
  if (!capturing || capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  std::fprintf(stderr, "dry run: %s while a graph is captured\n", what);
  return last_error = cudaErrorStreamCaptureUnsupported;
}

cudaError_t copy(void* to, const void* from, size_t size) {
  auto pageable = [](const void* p) { return !holds(device_memory, p) && !holds(pinned_memory, p); };
  if (capturing && (pageable(to) || pageable(from))) return forbidden("copy of pageable memory");
  std::memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t fill(void* at, int value, size_t size) {
  constexpr size_t page = 4096;
  auto* begin = static_cast<char*>(at);
  auto* whole = reinterpret_cast<char*>((reinterpret_cast<size_t>(begin) + page - 1) / page * page);
  size_t head = whole - begin;
  if (value != 0 || size < head + page) return std::memset(at, value, size), cudaSuccess;
  size_t pages = (size - head) / page * page;  // given back instead of written, which would take memory
  std::memset(begin, 0, head);
  madvise(whole, pages, MADV_DONTNEED);
  std::memset(whole + pages, 0, size - head - pages);
  return cudaSuccess;
}

// Executes a kernel of a PTX text, and returns 0 if it went well. sizes: grid, block, bytes of dynamic shared memory;
// memory: begin and end of each allocation.
using Emulator = int (*)(const char* ptx, const char* name, const unsigned* sizes, void** arguments,
                         const size_t* memory, size_t allocations);
Emulator emulator;

struct Function {
  std::string ptx, name;  // no PTX: what was loaded is machine code
};

CUresult emulate(const Function& f, dim3 grid, dim3 block, unsigned shared, void** arguments) {
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, shared};
  std::vector<size_t> memory;
  {
    Lock lock(mutex);
    for (const auto& [address, size] : device_memory) {
      memory.push_back(reinterpret_cast<size_t>(address));
      memory.push_back(memory.back() + size);
    }
  }
  const int status = emulator(f.ptx.c_str(), f.name.c_str(), sizes, arguments, memory.data(), memory.size() / 2);
  return status ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

cudaError_t launch(const std::string& kernel, dim3 grid, dim3 block, size_t shared) {
  count("kernel " + kernel);
  bool fits = grid.x && grid.y && grid.z && grid.y <= kGridLimit && grid.z <= kGridLimit;
  if (fits && block.x * block.y * block.z <= 1024 && shared <= kSharedMemory) return cudaSuccess;
  std::fprintf(stderr, "dry run: %s cannot be launched with grid %u %u %u, block %u, %zu bytes of shared memory\n",
               kernel.c_str(), grid.x, grid.y, grid.z, block.x * block.y * block.z, shared);
  return last_error = cudaErrorInvalidConfiguration;
}

int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return kSharedMemory;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return kSharedMemory + 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return 65536;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return kGridLimit;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    default:
      return 0;
  }
}

template <typename Handle>
Handle fresh() {
  static std::atomic<size_t> next{0};
  return reinterpret_cast<Handle>(next += 16);
}

double milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  return capturing && stream == capturing_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

}  // namespace

// What was called how often, on stdout; and from the start again.
API void dry_run_report() {
  Lock lock(mutex);
  for (const auto& [what, times] : calls) std::printf("%7ld %s\n", times, what.c_str());
  std::fflush(stdout);
  calls.clear();
}

// From now on, kernels that come as PTX are executed, but for those that are captured.
API void dry_run_emulate(Emulator with) { emulator = with; }

// The runtime: the device.
API cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(static_cast<int>(which)), cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::strcpy(p->name, "dry run");
  p->major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->sharedMemPerBlockOptin = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  p->sharedMemPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  p->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  p->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = kGridLimit;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(cudaError_t) { return "refused by the dry run"; }
API const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// Memory.
API cudaError_t cudaMalloc(void** address, size_t size) {
  if (cudaError_t error = forbidden("cudaMalloc")) return error;
  *address = nullptr;
  if (size == 0) return cudaSuccess;
  if (used_memory() + size > kMemory) return last_error = cudaErrorMemoryAllocation;
  *address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*address == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  Lock lock(mutex);
  device_memory[static_cast<char*>(*address)] = size;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* address) {
  if (cudaError_t error = forbidden("cudaFree")) return error;
  Lock lock(mutex);
  auto found = device_memory.find(static_cast<char*>(address));
  if (found == device_memory.end()) return cudaSuccess;
  munmap(address, found->second);
  device_memory.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  if (cudaError_t error = forbidden("cudaHostAlloc")) return error;
  *address = std::malloc(size);
  Lock lock(mutex);
  pinned_memory[static_cast<char*>(*address)] = size;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* address) {
  Lock lock(mutex);
  pinned_memory.erase(static_cast<char*>(address));
  std::free(address);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  *found = {};
  if (holds(device_memory, address)) found->type = cudaMemoryTypeDevice;
  if (holds(pinned_memory, address)) found->type = cudaMemoryTypeHost;
  if (found->type != cudaMemoryTypeUnregistered) found->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *total = kMemory, *free = kMemory - used_memory(), cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  count("copy of kind " + std::to_string(kind));
  return copy(to, from, size);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (cudaError_t error = forbidden("cudaMemcpy")) return error;
  return copy(to, from, size);
}
API cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) {
  count("memset");
  return fill(at, value, size);
}

// Streams, events and graphs.
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  return *s = fresh<cudaStream_t>(), cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return forbidden("cudaStreamSynchronize"); }
API cudaError_t cudaDeviceSynchronize() { return forbidden("cudaDeviceSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return forbidden("cudaEventSynchronize"); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return forbidden("cudaStreamQuery"); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return forbidden("cudaEventQuery"); }
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  capturing_stream = stream;
  return capturing = true, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = false;
  return *graph = fresh<cudaGraph_t>(), cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return *status = status_of(stream), cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (id) *id = 1;
  return *status = status_of(stream), cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  return *graph = fresh<cudaGraphExec_t>(), cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) { return *n = 1, cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new double(0)), cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<double*>(event), cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  return *reinterpret_cast<double*>(event) = milliseconds(), cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaEventElapsedTime(float* elapsed, cudaEvent_t start, cudaEvent_t end) {
  return *elapsed = *reinterpret_cast<double*>(end) - *reinterpret_cast<double*>(start), cudaSuccess;
}

// Kernels.
API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  kernel_names[host] = name;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration pushed;  // of <<<...>>>, until the launch takes it
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  return *static_cast<cudaStream_t*>(stream) = pushed.stream, cudaSuccess;
}
API cudaError_t __cudaGetKernel(void** kernel, const void* host) {
  return *kernel = const_cast<void*>(host), cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(kernel_names[host], grid, block, shared);
}
API cudaError_t __cudaLaunchKernel(void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(host, grid, block, arguments, shared, s);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->ptxVersion = found->binaryVersion = 90;
  found->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  static auto nothing = +[]() { return 0; };
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The driver, as Triton's launcher calls it.
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* context) { return *context = reinterpret_cast<CUcontext>(16), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned*, int* active) { return *active = 1, CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const auto* text = static_cast<const char*>(image);
  const bool is_ptx = !std::strncmp(text, "//", 2) || !std::strncmp(text, ".version", 8);
  return *module = reinterpret_cast<CUmodule>(new std::string(is_ptx ? text : "")), CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, ""); }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto* made = new Function{*reinterpret_cast<std::string*>(module), name};
  return *function = reinterpret_cast<CUfunction>(made), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  auto* pointer = reinterpret_cast<void*>(address);
  if (!holds(device_memory, pointer) && !holds(pinned_memory, pointer)) return CUDA_ERROR_INVALID_VALUE;
  return *static_cast<CUdeviceptr*>(value) = address, CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** text) { return *text = "refused by the dry run", CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                            unsigned block_z, unsigned shared, CUstream, void** arguments, void**) {
  const auto& f = *reinterpret_cast<const Function*>(function);
  dim3 grid(x, y, z), block(block_x, block_y, block_z);
  if (launch(f.name, grid, block, shared)) return CUDA_ERROR_INVALID_VALUE;
  return emulator && !f.ptx.empty() && !capturing ? emulate(f, grid, block, shared, arguments) : CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  return *n = 2, CUDA_SUCCESS;
}

// Matrix products.
API int cublasCreate_v2(void** handle) { return *handle = fresh<void*>(), 0; }
API size_t cublasLtGetVersion() { return 130000; }
API int cublasLtMatmulDescCreate(void** handle, int, int) { return *handle = fresh<void*>(), 0; }
API int cublasLtMatmulPreferenceCreate(void** handle) { return *handle = fresh<void*>(), 0; }
API int cublasLtMatrixLayoutCreate(void** handle, int, unsigned long, unsigned long, long) {
  return *handle = fresh<void*>(), 0;
}
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* n) {
  std::memset(results, 0, 96);  // cublasLtMatmulHeuristicResult_t: success
  return *n = 1, 0;
}
API int cublasLtMatmul(...) { return count("cublasLtMatmul"), 0; }
API int cublasGemmEx(...) { return count("cublasGemmEx"), 0; }
API int cublasSgemm_v2(...) { return count("cublasSgemm"), 0; }
API int cublasGemmStridedBatchedEx(...) { return count("cublasGemmStridedBatchedEx"), 0; }
