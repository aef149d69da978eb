// The row kernel of the token loss: a row of logits is read once, held in shared memory, and becomes its own gradient.
//
// Math     kernels/mvle_kernels/token_loss.py has it. A block takes one row r of C logits z, the first V of them words.
//          First sweep: m = max z, s = sum e^(z - m), the rank of the target: words that a stable sort by falling score
//          puts before it. partial[r] = m - z_t + log s. Second sweep: z becomes e^(z - m) / s - onehot(t), 0 from V on.
// Cost     reads and writes s C bytes a row (s: bytes of the type), once each: no kernel in place can do with less. Base
//          at 256 pairs and 4 masked words of each, bfloat16: 1024 rows of 50304 logits, 206 MB. Such a row is 98 KiB
//          of shared memory: two blocks on a multiprocessor of sm_90 or sm_100, so that one computes while the other
//          waits for its row; one on sm_80. A row that is longer than a block may have (163 KiB on sm_80, 227 KiB on the
//          others: 50304 logits of float32 fit there alone) is read twice. A thread takes the same vectors of sixteen
//          bytes in both sweeps, so a row needs no barrier: it is a thread's own registers, only more of them.
// Exact    float32 throughout; differences to the maximum come first, so that large logits lose nothing; a thread corrects
//          its sum as its maximum grows. e^x by the hardware's 2^x: two units in the last place. Sums over threads in a
//          fixed order, no atomics: bitwise repeatable. Logits that are not finite make loss and gradient so. Targets are
//          compared as wide as they are.
// Limits   words contiguous; targets int32 or int64, dense. Rows of which 16 does not divide the address or the bytes are
//          read and written value by value.
// Measured not yet measured on a GPU
#include <cfloat>

#include "launch.cuh"
#include "warp.cuh"

namespace mvle {
namespace {

constexpr int MOST_WARPS = 16;
constexpr size_t ROOM = 32 * sizeof(float);  // bytes of shared memory for what warps tell each other, before the row

struct TokenLoss {
  const void* targets;
  bool targets_64;
  int64_t ignore, stride_r;
  float* partial;
  int32_t* ranks;
  int V, C;
  bool wide;   // vectors can be read and written
  bool held;   // there is shared memory for a row
  bool slope;  // asked for
};

// One row in vectors of PER values. Every thread keeps to its own vectors.
template <class T>
struct Row {
  static constexpr int PER = PER_16<T>;
  T* values;
  Sixteen* copy;  // in shared memory; null where the row does not fit
  int V, C;
  bool wide;

  // Begins to bring vector i into shared memory.
  __device__ __forceinline__ void fetch(int i) const {
    if (wide)
      copy16_async(copy + i, values + i * PER, true);
    else
      store16(copy + i, from_memory(i));
  }

  // Vector i, which holds a word; -inf in the place of padding.
  __device__ __forceinline__ void load(int i, float (&z)[PER]) const {
    widen<T>(copy ? load16(copy + i) : from_memory(i), z);
    pad(i, z, -INFINITY);
  }

  // Vector i, with 0 in the place of padding.
  __device__ __forceinline__ void store(int i, float (&d)[PER]) const {
    pad(i, d, 0);
    if (wide) return store16(values + i * PER, narrow<T>(d));
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (i * PER + j < C) values[i * PER + j] = T(d[j]);
  }

 private:
  __device__ __forceinline__ Sixteen from_memory(int i) const {
    if (wide) return load16(values + i * PER);
    float z[PER];
#pragma unroll
    for (int j = 0; j < PER; j++) z[j] = i * PER + j < V ? float(values[i * PER + j]) : 0.0f;
    return narrow<T>(z);
  }

  __device__ __forceinline__ void pad(int i, float (&z)[PER], float with) const {
    if (i * PER + PER <= V) return;
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (i * PER + j >= V) z[j] = with;
  }
};

template <class T>
__global__ void __launch_bounds__(32 * MOST_WARPS, 2) token_loss_kernel(T* logits, TokenLoss k) {
  constexpr int PER = PER_16<T>;
  const int64_t r = blockIdx.x;
  const int64_t given = k.targets_64 ? static_cast<const int64_t*>(k.targets)[r]  // its lower half may name a word
                                     : static_cast<const int32_t*>(k.targets)[r];
  float* room = shared_as<float>();
  const Row<T> row{logits + r * k.stride_r, k.held ? shared_as<Sixteen>() + ROOM / 16 : nullptr, k.V, k.C, k.wide};
  int end = threadIdx.x;  // this thread's first vector without a gradient

  if (given == k.ignore) {
    if (threadIdx.x == 0) {
      k.partial[r] = 0;
      k.ranks[r] = -1;
    }
  } else {
    if (k.held)
      for (int i = threadIdx.x; i * PER < k.V; i += blockDim.x) row.fetch(i);
    const int target = given >= 0 && given < k.V ? int(given) : -1;
    const float own = target < 0 ? NAN : float(row.values[target]);
    copies_done();

    float highest = -FLT_MAX, mass = 0;  // no -inf: its difference to itself would not be a number
    int before = 0;
    for (int i = threadIdx.x; i * PER < k.V; i += blockDim.x) {
      float z[PER];
      row.load(i, z);
      const float lower = highest;
#pragma unroll
      for (int j = 0; j < PER; j++) highest = fmaxf(highest, z[j]);  // what is not a number shows in the sum
      mass *= exp2_fast((lower - highest) * LOG2_E);
#pragma unroll
      for (int j = 0; j < PER; j++) {
        mass += exp2_fast((z[j] - highest) * LOG2_E);
        before += z[j] > own || (z[j] == own && i * PER + j < target);
      }
    }
    const float mine = highest;
    highest = over_block(highest, Highest{}, room);
    mass = over_block(mass * exp2_fast((mine - highest) * LOG2_E), Add{}, room);
    before = over_block(before, Add{}, reinterpret_cast<int*>(room));
    const float log_mass = log2f(mass);

    if (threadIdx.x == 0) {
      const float total = log_mass * LN_2;
      k.partial[r] = highest - own + total;
      k.ranks[r] = fabsf(own) < INFINITY && fabsf(highest + total) < INFINITY ? before : k.V;
    }
    for (; k.slope && end * PER < k.V; end += blockDim.x) {
      float z[PER];
      row.load(end, z);
#pragma unroll
      for (int j = 0; j < PER; j++)
        z[j] = exp2_fast((z[j] - highest) * LOG2_E - log_mass) - (end * PER + j == target ? 1.0f : 0.0f);
      row.store(end, z);
    }
  }
  for (; k.slope && end * PER < k.C; end += blockDim.x) {
    float none[PER] = {};
    row.store(end, none);
  }
}

void token_loss_rows(const Tensor& logits, const Tensor& targets, const Tensor& partial, const Tensor& ranks,
                     int64_t ignore, int64_t vocabulary, bool with_slope) {
  const Place place(logits);
  const int64_t R = logits.size(0), C = logits.size(1);
  STD_TORCH_CHECK(vocabulary >= 1 && vocabulary <= C && C < int64_t{1} << 30, "expected at most 2^30 logits a row, of ",
                  "which 1 or more are words; got ", C, " and ", vocabulary);
  const bool targets_64 = targets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(targets_64 || targets.scalar_type() == ScalarType::Int, "expected targets of int32 or int64");
  TokenLoss k{};
  k.targets = targets.data_ptr(), k.targets_64 = targets_64;
  k.ignore = ignore, k.stride_r = logits.stride(0);
  k.partial = data<float>(partial), k.ranks = data<int32_t>(ranks);
  k.V = int(vocabulary), k.C = int(C);
  k.slope = with_slope;
  with_floating(logits, [&](auto value) {
    using T = decltype(value);
    const int64_t bytes = sizeof(T), vectors = (C + PER_16<T> - 1) / PER_16<T>;
    k.wide = divides(16, data<T>(logits), {k.stride_r * bytes, C * bytes});
    k.held = ROOM + 16 * vectors <= most_shared(place);
    const int warps = int(std::min<int64_t>(MOST_WARPS, (vectors + 31) / 32));
    launch("masked_token_loss", place, token_loss_kernel<T>, dim3(unsigned(R)), 32 * warps,
           ROOM + (k.held ? 16 * vectors : 0), data<T>(logits), k);
  });
}

}  // namespace
}  // namespace mvle

MVLE_SCHEMAS(m) {
  m.def(
      "token_loss_rows(Tensor(a!) logits, Tensor targets, Tensor(b!) partial, Tensor(c!) ranks, int ignore, "
      "int vocabulary, bool with_slope) -> ()");
}

MVLE_FUNCTIONS(m) { m.impl("token_loss_rows", TORCH_BOX(&mvle::token_loss_rows)); }
