// Between torch and a kernel: tensors of the stable ABI, the device and stream that they are on, and the launch.
//
// Each op's file defines functions that fill tensors which Python made (`Tensor(a!)`), and registers them under
// MVLE_LIBRARY: mvle_cuda for a GPU, mvle_cuda_emulated where the same file is compiled for the CPU. torch's own checks
// (fake tensors, autograd, FLOPs) are in Python, once for each op, whichever library runs it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "numeric.cuh"

#ifdef MVLE_EMULATED
#define MVLE_LIBRARY mvle_cuda_emulated
#define MVLE_KEY CPU
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define MVLE_LIBRARY mvle_cuda
#define MVLE_KEY CUDA
#endif

// MVLE_OP(schemas, functions): two lists of m.def(...) and m.impl(...), in the namespace of this build.
#define MVLE_FRAGMENT_OF(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define MVLE_IMPL_OF(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define MVLE_SCHEMAS(m) MVLE_FRAGMENT_OF(MVLE_LIBRARY, m)
#define MVLE_FUNCTIONS(m) MVLE_IMPL_OF(MVLE_LIBRARY, MVLE_KEY, m)

namespace mvle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- arguments -------------------------------------------------------------------------------------------------------

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// f(T{}) for the floating type that a tensor has.
template <class F>
void with_floating(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

template <class F>
void with_16_bits(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return f(BFloat16{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half, "expected bfloat16 or float16");
  f(Half{});
}

// Whether `bytes` divides the address and each of these numbers of bytes.
inline bool divides(int64_t bytes, const void* address, std::initializer_list<int64_t> numbers) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) return false;
  for (const int64_t number : numbers)
    if (number % bytes) return false;
  return true;
}

// ---- where it runs ---------------------------------------------------------------------------------------------------

#ifdef MVLE_EMULATED

class Place {
 public:
  explicit Place(const Tensor&) {}
};

inline size_t most_shared(const Place&) { return emulated::SHARED_LIMIT; }

template <class... P, class... A>
void launch(const char* name, const Place&, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
            const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulated::machine.run(name, grid, threads, shared, [&] { kernel(arguments...); }, emulated::seed++);
}

#else

// The device of a tensor as the current one, while this lives, and the stream that torch has current there.
class Place {
 public:
  explicit Place(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    using Current = int32_t (*)(int32_t, void**);
    // libtorch_cuda is not linked, so that this library also loads beside a torch for CPUs; in a process with a CUDA
    // tensor it is there
    static const Current current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      STD_TORCH_CHECK(library, "libtorch_cuda.so is not loaded: this torch has no CUDA");
      void* found = dlsym(library, "aoti_torch_get_current_cuda_stream");
      STD_TORCH_CHECK(found, "this torch does not tell its current CUDA stream");
      return reinterpret_cast<Current>(found);
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(current(tensor.get_device_index(), &stream) == 0, "torch does not tell its current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// Bytes of shared memory that a block may have, if it asks.
inline size_t most_shared(const Place&) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

template <class... P, class... A>
void launch(const char* name, const Place& place, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
            const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 << 10)  // more than every kernel may have unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  kernel<<<grid, threads, shared, place.stream()>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace mvle
