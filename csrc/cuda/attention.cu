// Ragged attention, forward: the queries of one sequence and head against their whole context, in shared memory.
//
// Math     kernels/mvle_kernels/attention.py has it. A warp takes 16 queries: t = Q K^T log2(e) / sqrt(E), m = max t,
//          p = 2^(t - m), l = sum p, O = p V / l, lse = m + log2(l), base 2. Up to 80 keys are one block in registers, so
//          the softmax is one pass; a longer context comes block by block, and m, l and O are corrected as m grows.
// Cost     reads s E (q + 2 k) bytes a head and sequence (s: bytes of the type), writes s E q + 4 q; 4 q k E operations,
//          in steps of 16 queries, 8 keys (16 in the second product) and 16 values: 197x14 makes 4 * 208 * 16 * E of them.
//          A context is fetched once for all queries of its block where it fits into shared memory (at least 240 rows of 64
//          values), else once for each 16 queries a warp.
// Exact    products of T summed in float32; p is rounded to T before it meets V, l is not. No atomics: bitwise repeatable.
// Limits   heads of 16 to 128 values; 16-bit types; any strides with contiguous values.
// Measured not yet measured on a GPU
#include "attention.cuh"

namespace mvle {
namespace {

constexpr int KEYS = 80;      // of a block of t in registers: 77, the rows of a masked image, are one
constexpr int N = KEYS / 8;   // products beside each other
constexpr int MOST_WARPS = 4;

struct Forward {
  const int32_t *q_offsets, *k_offsets, *kv_index, *order;
  float* lse;
  int sequences, H, E, work, fill;
  int parts;  // blocks that share the queries of a sequence
  int span;   // keys in shared memory at a time, a multiple of KEYS
  int64_t q_rows;
  float scale;
};

template <class T, int P>
__global__ void __launch_bounds__(32 * MOST_WARPS, P > 64 ? 2 : 4)
    attention_kernel(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, Forward f) {
  if (int(blockIdx.x) >= f.work) {
    zero_tail(out.data, f.q_offsets[f.sequences], f.q_rows, int64_t(f.H) * f.E, blockIdx.x - f.work, f.fill);
    return;
  }
  const int part = blockIdx.x % f.parts, head = blockIdx.x / f.parts % f.H;
  int s = blockIdx.x / f.parts / f.H;
  if (f.order) s = f.order[s];  // readers of one context follow one another, so that it comes out of the cache
  const int64_t q_first = f.q_offsets[s];
  const int q_length = int(f.q_offsets[s + 1] - q_first), warps = blockDim.x / 32;
  const int context = f.kv_index ? f.kv_index[s] : s;
  const int64_t k_first = f.k_offsets[context];
  const int k_length = int(f.k_offsets[context + 1] - k_first);
  const int tiles = (q_length + TILE - 1) / TILE;
  const bool whole = k_length <= f.span;

  T* keys = shared_as<T>();
  T* values = keys + f.span * PITCH<P>;
  T* queries = values + f.span * PITCH<P> + warp_of() * TILE * PITCH<P>;
  const int g = lane_of() / 4, t = lane_of() % 4;

  // every warp takes as many rounds: they meet where keys are fetched
  for (int round = part; round * warps < tiles; round += f.parts) {
    const int row = (round * warps + warp_of()) * TILE, rows = min(TILE, q_length - row);
    if (rows > 0) fetch_rows<P>(queries, q, head, q_first + row, rows, TILE, f.E, lane_of(), 32);
    float o[P / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};

    for (int start = 0; start == 0 || start < k_length; start += f.span) {
      const int there = min(f.span, k_length - start);
      if (!whole || round == part) {
        __syncthreads();  // nobody reads the keys of before
        const int count = (there + TILE - 1) / TILE * TILE;
        fetch_rows<P>(keys, k, head, k_first + start, there, count, f.E, threadIdx.x, blockDim.x);
        fetch_rows<P>(values, v, head, k_first + start, there, count, f.E, threadIdx.x, blockDim.x);
        copies_done();
        __syncthreads();
      } else if (start == 0) {
        copies_done();
        __syncwarp();
      }
      if (rows <= 0) continue;

      for (int block = 0; block < there; block += KEYS) {
        const int n_tiles = min(N, (there - block + 7) / 8);
        float p[N][4] = {};
#pragma unroll
        for (int e = 0; e < P / 16; e++) {
          uint32_t a[4];
          load_a<P>(a, queries, e * 16);
#pragma unroll
          for (int n = 0; n < N; n += 2) {
            if (n >= n_tiles) break;
            uint32_t b[4];
            load_b<P>(b, keys + (block + n * 8) * PITCH<P>, e * 16);
            multiply_add<T>(p[n], a, b[0], b[1]);
            if (n + 1 < n_tiles) multiply_add<T>(p[n + 1], a, b[2], b[3]);
          }
        }

        float highest[2] = {m[0], m[1]};
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const bool key_there = block + n * 8 + 2 * t + i % 2 < there;
            p[n][i] = key_there ? p[n][i] * f.scale : -INFINITY;
            highest[i / 2] = Highest{}(highest[i / 2], p[n][i]);
          }
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          highest[i] = over_lanes<4>(highest[i], Highest{});
          if (highest[i] == -INFINITY) highest[i] = 0;  // every t is -inf: no difference of infinities
          shrink[i] = exp2f(m[i] - highest[i]);
          m[i] = highest[i];
        }
        float sum[2] = {};
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            p[n][i] = exp2f(p[n][i] - m[i / 2]);
            sum[i / 2] += p[n][i];
          }
#pragma unroll
        for (int i = 0; i < 2; i++) l[i] = l[i] * shrink[i] + over_lanes<4>(sum[i], Add{});
        if (start + block > 0)
#pragma unroll
          for (int n = 0; n < P / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];

#pragma unroll
        for (int n = 0; n < N; n += 2) {
          if (n >= n_tiles) break;
          uint32_t a[4];
          as_a<T>(a, p[n], p[n + 1]);
#pragma unroll
          for (int e = 0; e < P / 16; e++) {
            uint32_t b[4];
            load_b_turned<P>(b, values + (block + n * 8) * PITCH<P>, e * 16);
            multiply_add<T>(o[2 * e], a, b[0], b[1]);
            multiply_add<T>(o[2 * e + 1], a, b[2], b[3]);
          }
        }
      }
    }

    if (rows <= 0) continue;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (m[i] == -INFINITY) m[i] = 0;  // only an empty context has no key at all
      if (l[i] == 0) l[i] = 1;
      const int at = row + g + 8 * i;
      if (t == 0 && at < q_length) f.lse[head * f.q_rows + q_first + at] = m[i] + log2f(l[i]);
    }
    __syncwarp();  // all lanes have read the queries
    keep<P>(queries, o, 1 / l[0], 1 / l[1]);
    __syncwarp();
    put_rows<P>(out, head, q_first + row, rows, queries, f.E, lane_of(), 32);
    __syncwarp();
  }
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                       const Tensor& k_offsets, const std::optional<Tensor>& kv_index,
                       const std::optional<Tensor>& order, const Tensor& out, const Tensor& lse, int64_t max_q,
                       int64_t max_k, double scale, int64_t parts) {
  const Place place(q);
  Forward f{};
  f.q_offsets = data<const int32_t>(q_offsets);
  f.k_offsets = data<const int32_t>(k_offsets);
  f.kv_index = kv_index ? data<const int32_t>(*kv_index) : nullptr;
  f.order = order ? data<const int32_t>(*order) : nullptr;
  f.lse = data<float>(lse);
  f.sequences = int(q_offsets.size(0) - 1);
  f.H = int(q.size(1)), f.E = int(q.size(2));
  f.q_rows = q.size(0);
  f.scale = float(scale);
  f.parts = int(parts);
  f.work = f.sequences * f.H * f.parts;
  f.fill = FILLERS;
  const int warps = max_q > 2 * TILE ? MOST_WARPS : max_q > TILE ? 2 : 1;
  with_16_bits(q, [&](auto value) {
    using T = decltype(value);
    with_head(f.E, [&](auto padded) {
      constexpr int P = decltype(padded)::value;
      // about 72 KiB of keys and values: two blocks or more on a multiprocessor
      constexpr int most = 18432 / PITCH<P> / KEYS * KEYS;
      f.span = int(std::min<int64_t>(most, (std::max<int64_t>(max_k, 1) + KEYS - 1) / KEYS * KEYS));
      const size_t bytes = sizeof(T) * PITCH<P> * (2 * f.span + warps * TILE);
      launch("ragged_attention", place, attention_kernel<T, P>, dim3(f.work + f.fill), 32 * warps, bytes,
             rows_of<const T>(q), rows_of<const T>(k), rows_of<const T>(v), rows_of<T>(out), f);
    });
  });
}

}  // namespace
}  // namespace mvle

MVLE_SCHEMAS(m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, Tensor? kv_index, "
      "Tensor? order, Tensor(a!) out, Tensor(b!) lse, int max_q, int max_k, float scale, int parts) -> ()");
}

MVLE_FUNCTIONS(m) { m.impl("attention_forward", TORCH_BOX(&mvle::attention_forward)); }
