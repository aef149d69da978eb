// What the forward and the backward of ragged attention share: where a sequence lies, and rows to and from shared memory.
#pragma once

#include "launch.cuh"
#include "warp.cuh"

namespace mvle {

constexpr int TILE = 16;  // rows of the first operand of one product of a warp
constexpr int FILLERS = 64;

// One of q, k, v, out or a gradient: rows of one head each lie `row` values apart, heads `head` values.
template <class T>
struct Rows {
  T* data;
  int64_t row, head;
  bool wide;  // 16 bytes can be read and written: 8 divides the head's size and all strides, 16 the address
};

template <class T>
Rows<T> rows_of(const Tensor& tensor) {
  T* at = data<T>(tensor);
  const int64_t row = tensor.stride(0), head = tensor.stride(1);
  const int64_t s = sizeof(T);
  return {at, row, head, divides(16, at, {row * s, head * s, tensor.size(2) * s})};
}

// Rows of a head in shared memory: E values, zeros up to P, and 8 more, so that rows which are read together lie in
// different banks.
template <int P>
constexpr int PITCH = P + 8;

// Rows first .. first + count of one head into shared memory, by the `threads` threads of which this is number `thread`.
// Rows from `there` on are zeros, so nothing of another sequence is read. Ends before the copies do: copies_done.
template <int P, class T>
__device__ __forceinline__ void fetch_rows(T* shared, const Rows<const T>& from, int head, int64_t first, int there,
                                           int count, int E, int thread, int threads) {
  const T* base = from.data + head * from.head + first * from.row;
  for (int i = thread; i < count * (P / 8); i += threads) {
    const int row = i / (P / 8), column = i % (P / 8) * 8;
    T* to = shared + row * PITCH<P> + column;
    if (from.wide) {
      copy16_async(to, base + row * from.row + column, row < there && column < E);
    } else {
      float values[8];
      load_eight<false>(base + row * from.row + column, row < there ? E - column : 0, values);
      store_eight<true>(to, 8, values);
    }
  }
}

// The first `there` rows in shared memory to rows first .. of one head of a dense result.
template <int P, class T>
__device__ __forceinline__ void put_rows(const Rows<T>& to, int head, int64_t first, int there, const T* shared, int E,
                                         int thread, int threads) {
  T* base = to.data + head * to.head + first * to.row;
  for (int i = thread; i < there * (P / 8); i += threads) {
    const int row = i / (P / 8), column = i % (P / 8) * 8;
    const T* from = shared + row * PITCH<P> + column;
    T* at = base + row * to.row + column;
    if (column >= E) continue;
    if (to.wide) {
      store16(at, load16(from));
    } else {
      for (int j = 0; j < 8 && column + j < E; j++) at[j] = from[j];
    }
  }
}

// f(integral_constant P) for the size, of those that kernels are compiled for, into which a head of E values fits.
template <class F>
void with_head(int64_t E, const F& f) {
  STD_TORCH_CHECK(E >= 1 && E <= 128, "expected heads of at most 128 values; got ", E);
  if (E <= 16) return f(std::integral_constant<int, 16>{});
  if (E <= 32) return f(std::integral_constant<int, 32>{});
  if (E <= 64) return f(std::integral_constant<int, 64>{});
  f(std::integral_constant<int, 128>{});
}

// Operand a of a product: 16 rows of shared memory, columns at .. at + 15.
template <int P, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* rows, int at) {
  const int lane = lane_of();
  load_matrices<false>(a, rows + (lane % 16) * PITCH<P> + at + lane / 16 * 8);
}

// Operand b of two products, of which column n is row n of shared memory: rows 0 .. 15, columns at .. at + 15. b[0], b[1]
// are of rows 0 .. 7, b[2], b[3] of rows 8 .. 15.
template <int P, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* rows, int at) {
  const int lane = lane_of();
  load_matrices<false>(b, rows + (lane % 8 + lane / 16 * 8) * PITCH<P> + at + lane / 8 % 2 * 8);
}

// Operand b of two products, of which row k is row k of shared memory: rows 0 .. 15, columns at .. at + 15. b[0], b[1] are
// of columns 0 .. 7, b[2], b[3] of columns 8 .. 15.
template <int P, class T>
__device__ __forceinline__ void load_b_turned(uint32_t (&b)[4], const T* rows, int at) {
  const int lane = lane_of();
  load_matrices<true>(b, rows + (lane % 16) * PITCH<P> + at + lane / 16 * 8);
}

// Two results of products beside each other [16 x 16] as operand a, rounded to T.
template <class T>
__device__ __forceinline__ void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// A warp's results [16 x P] into shared memory, times one number for each of its two rows.
template <int P, class T>
__device__ __forceinline__ void keep(T* rows, const float (&d)[P / 8][4], float upper, float lower) {
  const int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
  for (int n = 0; n < P / 8; n++) {
    const uint32_t both[2] = {pack<T>(d[n][0] * upper, d[n][1] * upper), pack<T>(d[n][2] * lower, d[n][3] * lower)};
#pragma unroll
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<uint32_t*>(rows + (g + 8 * i) * PITCH<P> + n * 8 + 2 * t) = both[i];
  }
}

// Zeros to rows first .. rows of a dense buffer, by block `block` of `blocks`.
template <class T>
__device__ __forceinline__ void zero_tail(T* x, int64_t first, int64_t rows, int64_t width, int block, int blocks) {
  for (int64_t i = first * width + block * int64_t(blockDim.x) + threadIdx.x; i < rows * width;
       i += int64_t(blocks) * blockDim.x)
    x[i] = T(0.0f);
}

}  // namespace mvle
