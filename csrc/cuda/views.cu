// The views of an image in one buffer: rows are scattered to where they are shown, their gradients gathered back.
//
// Math     kernels/mvle_kernels/views_triton.py has it. place [V, B, P] says in which row of the result view v of image b
//          shows position p (0: the class token, n + 1: patch n); -1: it does not; -2 - row: that row shows the mask
//          token. Forward: rows[place[v, b, p]] = (x[b, p - 1], the class token or the mask token) + positions[p].
//          Backward: the gradient of a patch is the sum over the views that show it, in order; those of positions and of
//          the mask token are sums over images: of a chunk of them here, of the chunks by torch.
// Cost     forward: x once where any view shows it, the result once, for two views in one launch; a block also reads the
//          lists of its image, 4 bytes a patch. Backward: the gradient once, that of x once, and 4 bytes of place for
//          each 256 values of a row. In vectors of 16 bytes. Base at 256 pairs: see views_triton.py.
// Exact    float32, rounded once; sums in a fixed order, no atomics: bitwise repeatable.
// Limits   a view shows a patch at most once; fewer than 2^31 rows; of x and the result, the result is as wide or wider.
// Measured not yet measured on a GPU
#include "launch.cuh"
#include "warp.cuh"

namespace mvle {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 16;             // positions of a block of the forward, or rows of the tail
constexpr int EIGHT = 8;             // values that a lane takes together
constexpr int COLUMNS = 32 * EIGHT;  // and a warp
constexpr int PAIR = 2;              // views of a launch
constexpr int RESIDENT = 9;          // blocks of the forward on a multiprocessor: the most without spilling

enum Kind : int { WHOLE, REPLACED, SUBSET };  // as views_op.py numbers them

// ---- forward ---------------------------------------------------------------------------------------------------------

// Positions and tokens: small, and of a type of their own, which is asked where they are read.
struct Parameter {
  const void* values;
  ScalarType type;
};

template <bool WIDE>
__device__ __forceinline__ void load_parameter(const Parameter& from, int64_t at, int there, float (&to)[EIGHT]) {
  if (from.type == ScalarType::Float)
    load_eight<WIDE>(static_cast<const float*>(from.values) + at, there, to);
  else if (from.type == ScalarType::BFloat16)
    load_eight<WIDE>(static_cast<const BFloat16*>(from.values) + at, there, to);
  else
    load_eight<WIDE>(static_cast<const Half*>(from.values) + at, there, to);
}

struct View {
  int kind;
  const int32_t *patches, *ends;  // the patches that it covers or shows, where they end for each image
  int64_t first;                  // row
};

struct Views {
  View of[PAIR];
  int count;
};

// What `place` holds of position p. listed: where in the list of its image the patch stands, from 1; 0: it does not.
__device__ __forceinline__ int32_t place_of(const View& view, int64_t b, int64_t p, int64_t P, int listed) {
  const int64_t row = view.first + b * P + p;
  if (view.kind == WHOLE) return int32_t(row);
  if (view.kind == REPLACED) return int32_t(listed ? -2 - row : row);
  return p == 0 || listed ? int32_t(view.first + view.ends[b] + b + listed) : -1;
}

__device__ __forceinline__ int64_t row_of(int32_t place) { return place < -1 ? -2 - int64_t{place} : place; }

template <class O, bool WIDE>
__device__ __forceinline__ void zero_row(O* row, int D) {
  const float zeros[EIGHT] = {};
  for (int d = lane_of() * EIGHT; d < D; d += COLUMNS) store_eight<WIDE>(row + d, D - d, zeros);
}

// A block takes ROWS positions of an image, a warp one of them at a time. Blocks behind the images zero rows from `end`
// to `total`. WIDE: 8 divides D, and vectors can be read and written.
template <class X, class O, bool WIDE>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    embed_kernel(const X* x, Parameter positions, Parameter class_token, Parameter mask_token, Views views, O* rows,
                 int32_t* offsets, int32_t* place, int64_t B, int64_t P, int D, int64_t stride_b, int64_t stride_n,
                 int64_t stride_p, int64_t end, int64_t total) {
  const int64_t groups = (P + ROWS - 1) / ROWS, b = blockIdx.x / groups;
  if (b >= B) {
    const int64_t tail = end + (blockIdx.x - B * groups) * ROWS;
    if (tail == end && threadIdx.x == 0) offsets[views.count * B] = int32_t(end);
    for (int64_t row = tail + warp_of(); row < min(tail + ROWS, total); row += WARPS)
      zero_row<O, WIDE>(rows + row * D, D);
    return;
  }
  const int64_t start = blockIdx.x % groups * ROWS;

  // lists turned round, for the positions of this block
  int32_t* listed = shared_as<int32_t>();  // [PAIR, ROWS]
  for (int i = threadIdx.x; i < PAIR * ROWS; i += THREADS) listed[i] = 0;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < PAIR; v++) {
    const View& view = views.of[v];
    if (v >= views.count || view.kind == WHOLE) continue;
    const int64_t begin = view.ends[b];
    const int count = int(view.ends[b + 1] - begin);
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const int64_t r = view.patches[begin + i] + 1 - start;
      if (r >= 0 && r < ROWS) listed[v * ROWS + r] = i + 1;
    }
  }
  __syncthreads();

  for (int r = warp_of(); r < ROWS && start + r < P; r += WARPS) {
    const int64_t p = start + r;
    int32_t at[PAIR];
    bool shows = false, covers = false;
#pragma unroll
    for (int v = 0; v < PAIR; v++) {
      at[v] = v < views.count ? place_of(views.of[v], b, p, P, listed[v * ROWS + r]) : -1;
      shows |= at[v] >= 0;
      covers |= at[v] < -1;
      if (v >= views.count || lane_of() != 0) continue;
      place[(v * B + b) * P + p] = at[v];
      if (p == 0) offsets[v * B + b] = at[v];
    }
    for (int d = lane_of() * EIGHT; d < D; d += COLUMNS) {
      float position[EIGHT], shown[EIGHT] = {}, covered[EIGHT] = {};
      load_parameter<WIDE>(positions, p * stride_p + d, D - d, position);
      if (shows && p > 0) load_eight<WIDE>(x + b * stride_b + (p - 1) * stride_n + d, D - d, shown);
      if (shows && p == 0) load_parameter<WIDE>(class_token, d, D - d, shown);
      if (covers) load_parameter<WIDE>(mask_token, d, D - d, covered);
#pragma unroll
      for (int i = 0; i < EIGHT; i++) {
        shown[i] += position[i];
        covered[i] += position[i];
      }
#pragma unroll
      for (int v = 0; v < PAIR; v++) {
        O* to = rows + row_of(at[v]) * D + d;
        if (at[v] >= 0) store_eight<WIDE>(to, D - d, shown);
        if (at[v] < -1) store_eight<WIDE>(to, D - d, covered);
      }
    }
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

// A block takes one position in a chunk of the images, COLUMNS of its values; a warp every fourth image. of_mask_token
// may be null: then no view covers anything.
template <class G, class X, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    embed_backward_kernel(const G* gradient, const int32_t* place, X* of_x, float* of_positions, float* of_mask_token,
                          int V, int64_t B, int64_t P, int D, int64_t stride_r, int chunk) {
  const int blocks = (D + COLUMNS - 1) / COLUMNS;  // of a row
  const int start = int(blockIdx.x % blocks) * COLUMNS, d = start + lane_of() * EIGHT;
  const int64_t p = blockIdx.x / blocks % P, part = blockIdx.x / blocks / P;
  const int64_t first = part * chunk;
  const int images = int(min(int64_t{chunk}, B - first));

  float* sums = shared_as<float>();                                         // [WARPS, 2, COLUMNS]
  int32_t* places = reinterpret_cast<int32_t*>(sums + WARPS * 2 * COLUMNS);  // [V, chunk]
  for (int i = threadIdx.x; i < V * images; i += THREADS) {
    const int v = i / images, image = i % images;
    places[v * chunk + image] = place[(v * B + first + image) * P + p];
  }
  __syncthreads();

  float total[EIGHT] = {}, covered[EIGHT] = {};
  for (int image = warp_of(); image < images && d < D; image += WARPS) {
    float own[EIGHT] = {};
    for (int v = 0; v < V; v++) {
      const int32_t at = places[v * chunk + image];
      if (at == -1) continue;
      float g[EIGHT];
      load_eight<WIDE>(gradient + row_of(at) * stride_r + d, D - d, g);
#pragma unroll
      for (int i = 0; i < EIGHT; i++) (at < -1 ? covered[i] : own[i]) += g[i];
    }
    if (p > 0) store_eight<WIDE>(of_x + ((first + image) * (P - 1) + p - 1) * D + d, D - d, own);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) total[i] += own[i];
  }

  store_eight<true>(sums + (warp_of() * 2 + 0) * COLUMNS + d - start, EIGHT, total);
  store_eight<true>(sums + (warp_of() * 2 + 1) * COLUMNS + d - start, EIGHT, covered);
  __syncthreads();
  for (int column = threadIdx.x; column < COLUMNS && start + column < D; column += THREADS) {
    float shown = 0, through = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      shown += sums[(w * 2 + 0) * COLUMNS + column];
      through += sums[(w * 2 + 1) * COLUMNS + column];
    }
    const int64_t to = (part * P + p) * D + start + column;
    of_positions[to] = shown + through;
    if (of_mask_token) of_mask_token[to] = through;
  }
}

// ---- launchers -------------------------------------------------------------------------------------------------------

Parameter parameter(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "expected float32, bfloat16 or float16");
  return {tensor.data_ptr(), type};
}

int64_t bytes_of(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

// f(N{}, W{}) for the types of a tensor and of one as wide or wider.
template <class F>
void with_both(const Tensor& narrow, const Tensor& wide, const F& f) {
  with_floating(wide, [&](auto w) {
    if (narrow.scalar_type() == wide.scalar_type()) return f(w, w);
    STD_TORCH_CHECK(wide.scalar_type() == ScalarType::Float, "expected one type, or one that is float32");
    with_16_bits(narrow, [&](auto n) { f(n, float{}); });
  });
}

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "more blocks than a grid has: ", blocks);
  return unsigned(blocks);
}

void embed(const Tensor& x, const Tensor& positions, const Tensor& class_token, const Tensor& mask_token,
           std::vector<Tensor> lists, std::vector<int64_t> kinds, std::vector<int64_t> firsts, const Tensor& rows,
           const Tensor& offsets, const Tensor& place) {
  const Place on(x);
  const int64_t B = x.size(0), P = x.size(1) + 1, D = x.size(2), V = int64_t(kinds.size()), total = rows.size(0);
  const int64_t stride_b = x.stride(0), stride_n = x.stride(1), stride_p = positions.stride(0);
  const Parameter of_positions = parameter(positions), first = parameter(class_token), mask = parameter(mask_token);
  size_t list = 0;
  for (int64_t v = 0; v < V; v += PAIR) {
    Views views{};
    for (views.count = 0; views.count < PAIR && v + views.count < V; views.count++) {
      View& view = views.of[views.count];
      view.kind = int(kinds[v + views.count]);
      view.first = firsts[v + views.count];
      if (view.kind == WHOLE) continue;
      view.patches = data<const int32_t>(lists[list++]);
      view.ends = data<const int32_t>(lists[list++]);
    }
    const bool last = v + views.count == V;
    const int64_t end = firsts[v + views.count], behind = last ? max((total - end + ROWS - 1) / ROWS, int64_t{1}) : 0;
    with_both(x, rows, [&](auto narrow, auto wide) {
      using X = decltype(narrow);
      using O = decltype(wide);
      const int64_t size = sizeof(X), s = bytes_of(of_positions.type);
      const bool vectors = D % EIGHT == 0 && divides(16, x.data_ptr(), {stride_b * size, stride_n * size}) &&
                           divides(16, of_positions.values, {stride_p * s}) && divides(16, first.values, {}) &&
                           divides(16, mask.values, {}) && divides(16, rows.data_ptr(), {});
      launch("embed_views", on, vectors ? embed_kernel<X, O, true> : embed_kernel<X, O, false>,
             dim3(grid_of(B * ((P + ROWS - 1) / ROWS) + behind)), THREADS, PAIR * ROWS * sizeof(int32_t),
             data<const X>(x), of_positions, first, mask, views, data<O>(rows), data<int32_t>(offsets) + v * B,
             data<int32_t>(place) + v * B * P, B, P, int(D), stride_b, stride_n, stride_p, end, total);
    });
  }
}

void embed_backward(const Tensor& gradient, const Tensor& place, const Tensor& of_x, const Tensor& of_positions,
                    const Tensor& of_mask_token, int64_t chunk) {
  const Place on(gradient);
  const int64_t V = place.size(0), B = place.size(1), P = place.size(2), D = gradient.size(1);
  const int64_t stride_r = gradient.stride(0), parts = of_positions.size(0);
  const size_t shared = (WARPS * 2 * COLUMNS + V * chunk) * sizeof(float);
  with_both(of_x, gradient, [&](auto narrow, auto wide) {
    using X = decltype(narrow);
    using G = decltype(wide);
    const bool vectors = D % EIGHT == 0 && divides(16, gradient.data_ptr(), {stride_r * int64_t{sizeof(G)}}) &&
                         divides(16, of_x.data_ptr(), {});
    launch("embed_views_backward", on, vectors ? embed_backward_kernel<G, X, true> : embed_backward_kernel<G, X, false>,
           dim3(grid_of((D + COLUMNS - 1) / COLUMNS * P * parts)), THREADS, shared, data<const G>(gradient),
           data<const int32_t>(place), data<X>(of_x), data<float>(of_positions),
           of_mask_token.numel() ? data<float>(of_mask_token) : nullptr, int(V), B, P, int(D), stride_r, int(chunk));
  });
}

}  // namespace
}  // namespace mvle

MVLE_SCHEMAS(m) {
  m.def(
      "embed_views(Tensor x, Tensor positions, Tensor class_token, Tensor mask_token, Tensor[] lists, int[] kinds, "
      "int[] firsts, Tensor(a!) rows, Tensor(b!) offsets, Tensor(c!) place) -> ()");
  m.def(
      "embed_views_backward(Tensor gradient, Tensor place, Tensor(a!) of_x, Tensor(b!) of_positions, "
      "Tensor(c!) of_mask_token, int chunk) -> ()");
}

MVLE_FUNCTIONS(m) {
  m.impl("embed_views", TORCH_BOX(&mvle::embed));
  m.impl("embed_views_backward", TORCH_BOX(&mvle::embed_backward));
}
