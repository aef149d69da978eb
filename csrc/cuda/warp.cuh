// What the threads of a warp or a block do together: sums and maxima in a fixed order, and products of matrices.
#pragma once

#include "numeric.cuh"

namespace mvle {

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

// Dynamic shared memory of the block as T, which 128 divides.
template <class T>
__device__ __forceinline__ T* shared_as() {
#ifdef MVLE_EMULATED
  return reinterpret_cast<T*>(emulated::machine.shared);
#else
  extern __shared__ __align__(128) unsigned char of_the_block[];
  return reinterpret_cast<T*>(of_the_block);
#endif
}

// ---- over threads ----------------------------------------------------------------------------------------------------

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Not fmaxf, which would lose what is not a number.
struct Highest {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Over groups of LANES lanes beside each other; every lane gets the result. Pairs in the same order always.
template <int LANES = 32, class T, class Op>
__device__ __forceinline__ T over_lanes(T value, Op op) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, value, apart);
    // the lower lane's value first, in both
    value = lane_of() & apart ? op(other, value) : op(value, other);
  }
  return value;
}

// Over all threads of a block of whole warps; every thread gets the result. room: 32 values of shared memory, in which
// nothing else lies. Meets twice.
template <class T, class Op>
__device__ __forceinline__ T over_block(T value, Op op, T* room) {
  value = over_lanes(value, op);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  __syncthreads();  // what the room held before was read
  if (lane_of() == 0) room[warp_of()] = value;
  __syncthreads();
  T total = room[0];
  for (int w = 1; w < warps; w++) total = op(total, room[w]);
  return total;
}

// ---- products of a warp ----------------------------------------------------------------------------------------------
//
// d [16 x 8] += a [16 x 16] b [16 x 8], T in, float out. With g = lane / 4 and t = lane % 4, a lane holds (PTX ISA,
// "Matrix Fragments for mma.m16n8k16"):
//   a  0: row g, columns 2t, 2t+1    1: row g + 8    2: row g, columns 2t + 8, 2t + 9    3: row g + 8, the same columns
//   b  0: rows 2t, 2t + 1 of column g                1: rows 2t + 8, 2t + 9
//   d  0, 1: row g, columns 2t, 2t + 1               2, 3: row g + 8
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MVLE_EMULATED
  struct Operands {
    uint32_t a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::Brought<Operands> all("mma.m16n8k16", ALL_LANES, mine);
  const auto half_of = [](uint32_t bits, int high) { return high ? unpack<T>(bits).high : unpack<T>(bits).low; };
  const int g = lane_of() / 4, t = lane_of() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + (i / 2) * 8, column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const float x = half_of(all[(row % 8) * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8], k % 2);
      const float y = half_of(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      sum += x * y;
    }
    d[i] += sum;
  }
#else
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + r names row r of matrix i, sixteen bytes. The
// lane gets of each matrix row g, columns 2t, 2t + 1; TURNED: rows 2t, 2t + 1 of column g.
template <bool TURNED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef MVLE_EMULATED
  const auto* inside = static_cast<const unsigned char*>(row);
  const emulated::Machine& machine = emulated::machine;
  if (inside < machine.shared || inside + 16 > machine.shared + machine.shared_bytes)
    emulated::machine.fail("ldmatrix: a row is not in shared memory");
  emulated::Brought<Sixteen> all(TURNED ? "ldmatrix.trans" : "ldmatrix", ALL_LANES, load16(row));
  const int g = lane_of() / 4, t = lane_of() % 4;
  for (int i = 0; i < 4; i++) {
    uint16_t both[2];
    for (int j = 0; j < 2; j++) {
      const int r = TURNED ? 2 * t + j : g, c = TURNED ? g : 2 * t + j;
      const Sixteen line = all[8 * i + r];
      std::memcpy(&both[j], reinterpret_cast<const char*>(line.word) + 2 * c, 2);
    }
    std::memcpy(&to[i], both, 4);
  }
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
#endif
}

}  // namespace mvle
