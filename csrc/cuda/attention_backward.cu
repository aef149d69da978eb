// Ragged attention, backward: queries against their context for dQ, then keys against their readers for dK and dV.
//
// Math     kernels/mvle_kernels/attention.py has it. With t as in the forward, p = 2^(t - lse), dO the gradient of O and
//          delta = rowsum(dO O):   ds = p (dO V^T - delta);   dQ = ds K / sqrt(E);   dV = p^T dO;   dK = ds^T Q / sqrt(E),
//          the last two summed over all readers of a context.
//          queries_kernel   a warp takes 16 queries: delta, and dQ over all keys
//          keys_kernel      a block takes up to 64 keys and one chunk of their readers (attention.py, `readers_of`), a warp
//                           16 of the keys; where a context has fewer, warps share its queries and add their sums in
//                           order. The first chunk of a context writes dK and dV, others (of hubs) write float32 parts
//          parts_kernel     adds these, in the order of chunks
// Cost     reads s E (5 q + 4 k) bytes a head and sequence (s: bytes of the type), writes s E (q + 2 k) + 4 q; 14 q k E
//          operations, of which 4 q k E make t and dO V^T a second time: so no sum of dQ crosses warps or blocks.
// Exact    as the forward; p and ds are rounded to T before products. Readers in the order of `readers_of`, shares of warps
//          and parts of hubs in their order, no atomics: bitwise repeatable. A hub's first part is rounded to T before
//          others are added.
// Limits   as the forward.
// Measured not yet measured on a GPU
#include "attention.cuh"

namespace mvle {
namespace {

constexpr int WARPS = 4;
constexpr int QUERIES = 64;  // in shared memory at a time, of keys_kernel

struct Backward {
  const int32_t *q_offsets, *k_offsets, *kv_index, *order, *chunks;  // chunks [C, 4]: context, first reader, readers, slot
  const float* lse;
  float *delta, *part_k, *part_v;
  int sequences, contexts, H, E, work, fill;
  int parts;   // of queries_kernel: blocks that share the queries of a sequence
  int span;    // of queries_kernel: keys in shared memory at a time
  int blocks;  // of keys_kernel: blocks of keys of the longest context
  int key_tiles, shares;  // of keys_kernel: warps of a block are key_tiles x shares
  int max_k;
  int64_t q_rows, k_rows;
  float scale, scale_2;  // of products; times log2(e)
};

// ---- dQ ---------------------------------------------------------------------------------------------------------------

template <class T, int P>
__global__ void __launch_bounds__(32 * WARPS, P > 64 ? 2 : P > 32 ? 3 : 4)
    queries_kernel(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> out, Rows<const T> gradient,
                   Rows<T> dq, Backward f) {
  if (int(blockIdx.x) >= f.work) {
    zero_tail(dq.data, f.q_offsets[f.sequences], f.q_rows, int64_t(f.H) * f.E, blockIdx.x - f.work, f.fill);
    return;
  }
  const int part = blockIdx.x % f.parts, head = blockIdx.x / f.parts % f.H;
  int s = blockIdx.x / f.parts / f.H;
  if (f.order) s = f.order[s];
  const int64_t q_first = f.q_offsets[s];
  const int q_length = int(f.q_offsets[s + 1] - q_first), warps = blockDim.x / 32;
  const int context = f.kv_index ? f.kv_index[s] : s;
  const int64_t k_first = f.k_offsets[context];
  const int k_length = int(f.k_offsets[context + 1] - k_first);
  const int tiles = (q_length + TILE - 1) / TILE;
  const bool whole = k_length <= f.span;

  T* keys = shared_as<T>();
  T* values = keys + f.span * PITCH<P>;
  T* queries = values + f.span * PITCH<P> + warp_of() * 2 * TILE * PITCH<P>;
  T* slopes = queries + TILE * PITCH<P>;
  const int g = lane_of() / 4, t = lane_of() % 4;

  for (int round = part; round * warps < tiles; round += f.parts) {
    const int row = (round * warps + warp_of()) * TILE, rows = min(TILE, q_length - row);
    float total[P / 8][4] = {}, lse[2] = {}, delta[2] = {};
    if (rows > 0) {
      fetch_rows<P>(queries, q, head, q_first + row, rows, TILE, f.E, lane_of(), 32);
      fetch_rows<P>(slopes, gradient, head, q_first + row, rows, TILE, f.E, lane_of(), 32);
      copies_done();
      __syncwarp();
      // two lanes a row: each adds half of its values
      const int mine = lane_of() / 2;
      float sum = 0;
      if (mine < rows)
        for (int e = lane_of() % 2 * 8; e < f.E; e += 16) {
          float result[8], slope[8];
          const T* at = out.data + (q_first + row + mine) * out.row + head * out.head + e;
          if (out.wide)
            load_eight<true>(at, 8, result);
          else
            load_eight<false>(at, f.E - e, result);
          load_eight<true>(slopes + mine * PITCH<P> + e, 8, slope);
#pragma unroll
          for (int i = 0; i < 8; i++) sum += result[i] * slope[i];
        }
      sum = over_lanes<2>(sum, Add{});
      if (mine < rows && lane_of() % 2 == 0) f.delta[head * f.q_rows + q_first + row + mine] = sum;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        delta[i] = __shfl_sync(ALL_LANES, sum, 2 * (g + 8 * i));
        if (g + 8 * i < rows) lse[i] = f.lse[head * f.q_rows + q_first + row + g + 8 * i];
      }
    }

    for (int start = 0; start < k_length; start += f.span) {
      const int there = min(f.span, k_length - start);
      if (!whole || round == part) {
        __syncthreads();  // nobody reads the keys of before
        const int count = (there + TILE - 1) / TILE * TILE;
        fetch_rows<P>(keys, k, head, k_first + start, there, count, f.E, threadIdx.x, blockDim.x);
        fetch_rows<P>(values, v, head, k_first + start, there, count, f.E, threadIdx.x, blockDim.x);
        copies_done();
        __syncthreads();
      }
      if (rows <= 0) continue;
      for (int key = 0; key < there; key += TILE) {
        const T *key_rows = keys + key * PITCH<P>, *value_rows = values + key * PITCH<P>;
        float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
        for (int e = 0; e < P / 16; e++) {
          uint32_t a[4], b[4];
          load_a<P>(a, queries, e * 16);
          load_b<P>(b, key_rows, e * 16);
          multiply_add<T>(p[0], a, b[0], b[1]);
          multiply_add<T>(p[1], a, b[2], b[3]);
          load_a<P>(a, slopes, e * 16);
          load_b<P>(b, value_rows, e * 16);
          multiply_add<T>(ds[0], a, b[0], b[1]);
          multiply_add<T>(ds[1], a, b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const bool key_there = key + n * 8 + 2 * t + i % 2 < there;
            const float weight = exp2f(p[n][i] * f.scale_2 - lse[i / 2]);
            ds[n][i] = key_there ? weight * (ds[n][i] - delta[i / 2]) : 0.0f;
          }
        uint32_t a[4];
        as_a<T>(a, ds[0], ds[1]);
#pragma unroll
        for (int e = 0; e < P / 16; e++) {
          uint32_t b[4];
          load_b_turned<P>(b, key_rows, e * 16);
          multiply_add<T>(total[2 * e], a, b[0], b[1]);
          multiply_add<T>(total[2 * e + 1], a, b[2], b[3]);
        }
      }
    }

    if (rows <= 0) continue;
    __syncwarp();  // all lanes have read the queries
    keep<P>(queries, total, f.scale, f.scale);
    __syncwarp();
    put_rows<P>(dq, head, q_first + row, rows, queries, f.E, lane_of(), 32);
    __syncwarp();
  }
}

// ---- dK and dV --------------------------------------------------------------------------------------------------------

// The sums of a warp's 16 keys to float32 rows, the first of which is `base`.
template <int P>
__device__ __forceinline__ void put_part(float* base, const float (&d)[P / 8][4], float scale, int there, int E,
                                         int64_t pitch) {
  const int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
  for (int n = 0; n < P / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = g + i / 2 * 8, e = n * 8 + 2 * t + i % 2;
      if (row < there && e < E) base[row * pitch + e] = d[n][i] * scale;
    }
}

template <class T, int P>
__global__ void __launch_bounds__(32 * WARPS, P > 64 ? 2 : P > 32 ? 3 : 4)
    keys_kernel(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> gradient, Rows<T> dk, Rows<T> dv,
                Backward f) {
  if (int(blockIdx.x) >= f.work) {
    const int64_t width = int64_t(f.H) * f.E, tail = f.k_offsets[f.contexts];
    zero_tail(dk.data, tail, f.k_rows, width, blockIdx.x - f.work, f.fill);
    zero_tail(dv.data, tail, f.k_rows, width, blockIdx.x - f.work, f.fill);
    return;
  }
  const int head = blockIdx.x % f.H, block = blockIdx.x / f.H % f.blocks, chunk = blockIdx.x / f.H / f.blocks;
  int context = chunk, first = chunk, count = 1, slot = -1;
  if (f.chunks) {
    context = f.chunks[chunk * 4], first = f.chunks[chunk * 4 + 1];
    count = f.chunks[chunk * 4 + 2], slot = f.chunks[chunk * 4 + 3];
  }
  if (context < 0) return;
  const int64_t k_first = f.k_offsets[context];
  const int k_length = int(f.k_offsets[context + 1] - k_first), key = block * f.key_tiles * TILE;
  if (key >= k_length) return;

  const int tile = warp_of() % f.key_tiles, share = warp_of() / f.key_tiles;
  T* keys = shared_as<T>();
  T* values = keys + f.key_tiles * TILE * PITCH<P>;
  T* queries = values + f.key_tiles * TILE * PITCH<P>;
  T* slopes = queries + QUERIES * PITCH<P>;
  float* lse = reinterpret_cast<float*>(slopes + QUERIES * PITCH<P>);
  float* delta = lse + QUERIES;
  T *key_rows = keys + tile * TILE * PITCH<P>, *value_rows = values + tile * TILE * PITCH<P>;
  fetch_rows<P>(keys, k, head, k_first + key, k_length - key, f.key_tiles * TILE, f.E, threadIdx.x, blockDim.x);
  fetch_rows<P>(values, v, head, k_first + key, k_length - key, f.key_tiles * TILE, f.E, threadIdx.x, blockDim.x);

  float sum_k[P / 8][4] = {}, sum_v[P / 8][4] = {};
  const int t = lane_of() % 4;
  for (int reader = first; reader < first + count; reader++) {
    const int s = f.order ? f.order[reader] : reader;
    const int64_t q_first = f.q_offsets[s];
    const int q_length = int(f.q_offsets[s + 1] - q_first);
    for (int start = 0; start < q_length; start += QUERIES) {
      const int there = min(QUERIES, q_length - start), rows = (there + TILE - 1) / TILE * TILE;
      __syncthreads();  // nobody reads the queries of before
      fetch_rows<P>(queries, q, head, q_first + start, there, rows, f.E, threadIdx.x, blockDim.x);
      fetch_rows<P>(slopes, gradient, head, q_first + start, there, rows, f.E, threadIdx.x, blockDim.x);
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int64_t at = head * f.q_rows + q_first + start + i;
        lse[i] = i < there ? f.lse[at] : 0.0f;
        delta[i] = i < there ? f.delta[at] : 0.0f;
      }
      copies_done();
      __syncthreads();
      for (int row = share * TILE; row < there; row += f.shares * TILE) {
        float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
        for (int e = 0; e < P / 16; e++) {
          uint32_t a[4], b[4];
          load_a<P>(a, key_rows, e * 16);
          load_b<P>(b, queries + row * PITCH<P>, e * 16);
          multiply_add<T>(p[0], a, b[0], b[1]);
          multiply_add<T>(p[1], a, b[2], b[3]);
          load_a<P>(a, value_rows, e * 16);
          load_b<P>(b, slopes + row * PITCH<P>, e * 16);
          multiply_add<T>(ds[0], a, b[0], b[1]);
          multiply_add<T>(ds[1], a, b[2], b[3]);
        }
        // rows of keys past the context come out as anything, and are not stored; queries past theirs have a gradient
        // and a delta of zero
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int query = row + n * 8 + 2 * t + i % 2;
            p[n][i] = exp2f(p[n][i] * f.scale_2 - lse[query]);
            ds[n][i] = p[n][i] * (ds[n][i] - delta[query]);
          }
        uint32_t a[4], c[4];
        as_a<T>(a, p[0], p[1]);
        as_a<T>(c, ds[0], ds[1]);
#pragma unroll
        for (int e = 0; e < P / 16; e++) {
          uint32_t b[4];
          load_b_turned<P>(b, slopes + row * PITCH<P>, e * 16);
          multiply_add<T>(sum_v[2 * e], a, b[0], b[1]);
          multiply_add<T>(sum_v[2 * e + 1], a, b[2], b[3]);
          load_b_turned<P>(b, queries + row * PITCH<P>, e * 16);
          multiply_add<T>(sum_k[2 * e], c, b[0], b[1]);
          multiply_add<T>(sum_k[2 * e + 1], c, b[2], b[3]);
        }
      }
    }
  }

  // shares of the queries of one tile of keys, added in their order by the first
  float* room = reinterpret_cast<float*>(queries) + tile * 2 * TILE * P + lane_of();
  for (int other = 1; other < f.shares; other++) {
    __syncthreads();
    if (share == other)
#pragma unroll
      for (int n = 0; n < P / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          room[(n * 4 + i) * 32] = sum_k[n][i];
          room[(n * 4 + i) * 32 + TILE * P] = sum_v[n][i];
        }
    __syncthreads();
    if (share == 0)
#pragma unroll
      for (int n = 0; n < P / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sum_k[n][i] += room[(n * 4 + i) * 32];
          sum_v[n][i] += room[(n * 4 + i) * 32 + TILE * P];
        }
  }
  copies_done();
  __syncthreads();  // nobody reads keys and values any more
  const int own = key + tile * TILE, there = min(TILE, k_length - own);
  if (share > 0 || there <= 0) return;
  if (slot < 0) {
    keep<P>(key_rows, sum_k, f.scale, f.scale);
    keep<P>(value_rows, sum_v, 1.0f, 1.0f);
    __syncwarp();
    put_rows<P>(dk, head, k_first + own, there, key_rows, f.E, lane_of(), 32);
    put_rows<P>(dv, head, k_first + own, there, value_rows, f.E, lane_of(), 32);
  } else {
    const int64_t width = int64_t(f.H) * f.E, at = (int64_t(slot) * f.max_k + own) * width + int64_t(head) * f.E;
    put_part<P>(f.part_k + at, sum_k, f.scale, there, f.E, width);
    put_part<P>(f.part_v + at, sum_v, 1.0f, there, f.E, width);
  }
}

// To a hub's dK and dV the parts of its further chunks, in order. slots [P, 4]: context whose parts begin here, how many.
template <class T>
__global__ void __launch_bounds__(256)
    parts_kernel(const int32_t* slots, const int32_t* k_offsets, const float* part_k, const float* part_v, T* dk, T* dv,
                 int max_k, int64_t width) {
  const int64_t slot = blockIdx.x;
  const int count = slots[slot * 4 + 1];
  if (count == 0) return;
  const int context = slots[slot * 4];
  const int64_t first = k_offsets[context], size = (k_offsets[context + 1] - first) * width;
  for (int64_t x = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; x < size; x += int64_t(gridDim.y) * blockDim.x) {
    float sum_k = float(dk[first * width + x]), sum_v = float(dv[first * width + x]);
    for (int part = 0; part < count; part++) {
      const int64_t at = (slot + part) * max_k * width + x;
      sum_k += part_k[at];
      sum_v += part_v[at];
    }
    dk[first * width + x] = T(sum_k);
    dv[first * width + x] = T(sum_v);
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------

void attention_backward(const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& q_offsets, const Tensor& k_offsets,
                        const std::optional<Tensor>& kv_index, const std::optional<Tensor>& order,
                        const std::optional<Tensor>& chunks, const std::optional<Tensor>& slots, const Tensor& delta,
                        const Tensor& part_k, const Tensor& part_v, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv, int64_t max_q, int64_t max_k, double scale, int64_t parts) {
  const Place place(q);
  const auto numbers = [](const std::optional<Tensor>& x) { return x ? data<const int32_t>(*x) : nullptr; };
  Backward f{};
  f.q_offsets = data<const int32_t>(q_offsets);
  f.k_offsets = data<const int32_t>(k_offsets);
  f.kv_index = numbers(kv_index), f.order = numbers(order), f.chunks = numbers(chunks);
  f.lse = data<const float>(lse);
  f.delta = data<float>(delta), f.part_k = data<float>(part_k), f.part_v = data<float>(part_v);
  f.sequences = int(q_offsets.size(0) - 1), f.contexts = int(k_offsets.size(0) - 1);
  f.H = int(q.size(1)), f.E = int(q.size(2));
  f.q_rows = q.size(0), f.k_rows = k.size(0);
  f.max_k = int(max_k);
  f.scale = float(scale), f.scale_2 = float(scale) * LOG2_E;
  f.parts = int(parts), f.fill = FILLERS;
  const int q_tiles = int((max_q + TILE - 1) / TILE), k_tiles = int((max_k + TILE - 1) / TILE);
  f.key_tiles = k_tiles > 2 ? 4 : k_tiles > 1 ? 2 : 1;
  f.shares = std::min(WARPS / f.key_tiles, q_tiles > 2 ? 4 : q_tiles > 1 ? 2 : 1);
  f.blocks = std::max(1, (k_tiles + f.key_tiles - 1) / f.key_tiles);
  const int chunks_there = chunks ? int(chunks->numel() / 4) : f.contexts;
  with_16_bits(q, [&](auto value) {
    using T = decltype(value);
    with_head(f.E, [&](auto padded) {
      constexpr int P = decltype(padded)::value;
      const int warps = q_tiles > 2 ? WARPS : q_tiles > 1 ? 2 : 1;
      // about 64 KiB of keys and values: beside queries of 128 values, not more than the 99 KiB of sm_86, sm_89, sm_120
      constexpr int most = 16384 / PITCH<P> / TILE * TILE;
      f.span = std::min(most, std::max(1, k_tiles) * TILE);
      f.work = f.sequences * f.H * f.parts;
      const auto rows = [](const Tensor& x) { return rows_of<const T>(x); };
      launch("ragged_attention_backward, queries", place, queries_kernel<T, P>, dim3(f.work + f.fill), 32 * warps,
             sizeof(T) * PITCH<P> * (2 * f.span + warps * 2 * TILE), rows(q), rows(k), rows(v), rows(out),
             rows(gradient), rows_of<T>(dq), f);
      f.work = chunks_there * f.H * f.blocks;
      const size_t bytes = sizeof(T) * PITCH<P> * 2 * (f.key_tiles * TILE + QUERIES) + sizeof(float) * 2 * QUERIES;
      launch("ragged_attention_backward, keys", place, keys_kernel<T, P>, dim3(f.work + f.fill),
             32 * f.key_tiles * f.shares, bytes, rows(q), rows(k), rows(v), rows(gradient), rows_of<T>(dk),
             rows_of<T>(dv), f);
    });
    if (slots && slots->numel()) {
      const int64_t width = int64_t(f.H) * f.E, spread = std::min<int64_t>((max_k * width + 2047) / 2048, 65535);
      launch("ragged_attention_backward, parts", place, parts_kernel<T>,
             dim3(unsigned(slots->numel() / 4), unsigned(spread)), 256, 0, data<const int32_t>(*slots), f.k_offsets,
             static_cast<const float*>(f.part_k), static_cast<const float*>(f.part_v), data<T>(dk), data<T>(dv),
             f.max_k, width);
    }
  });
}

}  // namespace
}  // namespace mvle

MVLE_SCHEMAS(m) {
  m.def(
      "attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_offsets, "
      "Tensor k_offsets, Tensor? kv_index, Tensor? order, Tensor? chunks, Tensor? slots, Tensor(a!) delta, "
      "Tensor(b!) part_k, Tensor(c!) part_v, Tensor(d!) dq, Tensor(e!) dk, Tensor(f!) dv, int max_q, int max_k, "
      "float scale, int parts) -> ()");
}

MVLE_FUNCTIONS(m) { m.impl("attention_backward", TORCH_BOX(&mvle::attention_backward)); }
