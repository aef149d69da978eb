// Numbers as kernels hold them: what is stored in 16 bits and computed in float, sixteen bytes at a time, and products
// of small matrices by a warp. Each has two bodies: the device's instruction, and the same result on a CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#ifdef MVLE_EMULATED
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mvle {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

// 2^x by one instruction: right to two units in the last place; 0 where it would be below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef MVLE_EMULATED
  const float found = exp2f(x);
  return found < 0x1p-126f ? 0 : found;
#else
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
#endif
}

// ---- sixteen bytes -------------------------------------------------------------------------------------------------

// Sixteen bytes, the widest access that memory has.
struct alignas(16) Sixteen {
  uint32_t word[4];
};

template <class T>
constexpr int PER_16 = 16 / sizeof(T);

// sixteen bytes at `from`, which 16 divides
__device__ __forceinline__ Sixteen load16(const void* from) {
#ifdef MVLE_EMULATED
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::machine.fail("load16: the address is not a multiple of 16");
  if (!emulated::machine.is_shared(from)) emulated::bytes_read += 16;
  Sixteen found;
  std::memcpy(&found, from, 16);
  return found;
#else
  const uint4 found = *reinterpret_cast<const uint4*>(from);
  return {{found.x, found.y, found.z, found.w}};
#endif
}

__device__ __forceinline__ void store16(void* to, const Sixteen& value) {
#ifdef MVLE_EMULATED
  if (reinterpret_cast<uintptr_t>(to) % 16) emulated::machine.fail("store16: the address is not a multiple of 16");
  std::memcpy(to, &value, 16);
#else
  *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
#endif
}

// Start a copy of sixteen bytes from global to shared memory; `there` false: zeros, and nothing is read. Done after
// `copies_done` and a barrier.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool there) {
#ifdef MVLE_EMULATED
  store16(shared, there ? load16(global) : Sixteen{});
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
#endif
}

// This thread's copies are done.
__device__ __forceinline__ void copies_done() {
#ifndef MVLE_EMULATED
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- pairs of 16 bits ----------------------------------------------------------------------------------------------

struct Pair {
  float low, high;
};

// Two floats rounded to T, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifdef MVLE_EMULATED
  const T both[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
#endif
}

template <class T>
__device__ __forceinline__ Pair unpack(uint32_t bits) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t low = bits << 16, high = bits & 0xffff0000u;
#ifdef MVLE_EMULATED
    Pair both;
    std::memcpy(&both.low, &low, 4);
    std::memcpy(&both.high, &high, 4);
    return both;
#else
    return {__uint_as_float(low), __uint_as_float(high)};
#endif
  } else {
#ifdef MVLE_EMULATED
    T both[2];
    std::memcpy(both, &bits, 4);
    return {float(both[0]), float(both[1])};
#else
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    return {both.x, both.y};
#endif
  }
}

// ---- rows of values ------------------------------------------------------------------------------------------------

// The values of T in sixteen bytes as floats, and back.
template <class T>
__device__ __forceinline__ void widen(const Sixteen& from, float (&to)[PER_16<T>]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      const Pair both = unpack<T>(from.word[i]);
      to[2 * i] = both.low;
      to[2 * i + 1] = both.high;
    } else {
#ifdef MVLE_EMULATED
      std::memcpy(&to[i], &from.word[i], 4);
#else
      to[i] = __uint_as_float(from.word[i]);
#endif
    }
  }
}

template <class T>
__device__ __forceinline__ Sixteen narrow(const float (&from)[PER_16<T>]) {
  Sixteen to;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      to.word[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    } else {
#ifdef MVLE_EMULATED
      std::memcpy(&to.word[i], &from[i], 4);
#else
      to.word[i] = __float_as_uint(from[i]);
#endif
    }
  }
  return to;
}

// Eight bytes at `from`, which 8 divides.
__device__ __forceinline__ void load8(const void* from, uint32_t (&word)[2]) {
#ifdef MVLE_EMULATED
  if (reinterpret_cast<uintptr_t>(from) % 8) emulated::machine.fail("load8: the address is not a multiple of 8");
  if (!emulated::machine.is_shared(from)) emulated::bytes_read += 8;
  std::memcpy(word, from, 8);
#else
  const uint2 found = *reinterpret_cast<const uint2*>(from);
  word[0] = found.x;
  word[1] = found.y;
#endif
}

// Eight values beside each other as floats, and back. WIDE: by vectors, so that 16 divides the address and all eight
// are there; else the first `there` of them, 0 for the others.
template <bool WIDE, class T>
__device__ __forceinline__ void load_eight(const T* from, int there, float (&to)[8]) {
  if constexpr (WIDE) {
#pragma unroll
    for (int i = 0; i < 8; i += PER_16<T>) {
      float part[PER_16<T>];
      widen<T>(load16(from + i), part);
#pragma unroll
      for (int j = 0; j < PER_16<T>; j++) to[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = i < there ? float(from[i]) : 0.0f;
  }
}

template <bool WIDE, class T>
__device__ __forceinline__ void store_eight(T* to, int there, const float (&from)[8]) {
  if constexpr (WIDE) {
#pragma unroll
    for (int i = 0; i < 8; i += PER_16<T>) {
      float part[PER_16<T>];
#pragma unroll
      for (int j = 0; j < PER_16<T>; j++) part[j] = from[i + j];
      store16(to + i, narrow<T>(part));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < there) to[i] = T(from[i]);
  }
}

}  // namespace mvle
