// The pixel loss of masked patches: targets from the uint8 image, their statistics, the loss and its gradient, one read.
//
// Math     kernels/mvle_kernels/pixel_loss.py has it. A warp takes one row r: t = the X values of the patch that rows[r]
//          names, normalised; per_patch: minus their mean, over sqrt(unbiased variance + 1e-6), in two passes over
//          registers; d = prediction - t; partial[r] = sum of |d|, d^2 or both; slope[r] = sign(d), 2 d or both.
// Cost     a row reads s X bytes of prediction (s: bytes of its type) and X of image, writes 4, and s X with a slope.
//          Each value is loaded and stored once. A lane takes eight values beside each other: 8 bytes of image, 16 of
//          a 16-bit prediction.
// Exact    float32; sums over lanes in a fixed order: bitwise repeatable.
// Limits   X = 3 patch^2 <= 4096; the last dimension of the prediction contiguous.
// Measured not yet measured on a GPU
#include "launch.cuh"
#include "warp.cuh"

namespace mvle {
namespace {

constexpr int WARPS = 4;  // rows of a block
constexpr int EIGHT = 8;  // values that a lane takes together

struct Pixels {
  const uint8_t* images;
  int64_t stride_b, stride_h, stride_w, stride_c;
  int patch, across, patches;  // pixels of a patch's side; patches of an image from side to side, and all
  float scale[3], shift[3];    // pixel * scale + shift, of each channel
};

__device__ __forceinline__ float normalised(const Pixels& p, uint32_t byte, int channel) {
  const float scale = channel == 0 ? p.scale[0] : channel == 1 ? p.scale[1] : p.scale[2];
  const float shift = channel == 0 ? p.shift[0] : channel == 1 ? p.shift[1] : p.shift[2];
  return float(byte) * scale + shift;
}

// Values x .. x + 7 of the patch at `corner`, in the order (row, column, channel); 0 from value X on. WIDE: a row of
// pixels is contiguous, and 8 divides its length in a patch and every address.
template <bool WIDE>
__device__ __forceinline__ void target_of(const Pixels& p, const uint8_t* corner, int x, int X, float (&t)[EIGHT]) {
  const int line = 3 * p.patch;
  if constexpr (WIDE) {
    const uint8_t* from = corner + (x / line) * p.stride_h + x % line;
    uint32_t word[2];
    load8(from, word);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) t[i] = normalised(p, word[i / 4] >> i % 4 * 8 & 255, (x + i) % 3);
  } else {
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
      const int at = x + i, channel = at % 3;
      const int64_t offset = at / line * p.stride_h + at % line / 3 * p.stride_w + channel * p.stride_c;
      t[i] = at < X ? normalised(p, corner[offset], channel) : 0.0f;
    }
  }
}

// CHUNKS: of eight values, of a lane. WIDE: X is a multiple of 8, and vectors can be read and written.
template <class T, int CHUNKS, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS)
    pixel_loss_kernel(const T* prediction, const int32_t* rows, float* partial, T* slope, int64_t R, int X, int64_t stride_r,
                      Pixels p, bool l1, bool mse, bool per_patch) {
  const int64_t r = int64_t{blockIdx.x} * WARPS + warp_of();
  if (r >= R) return;
  const int64_t which = rows[r];
  if (which < 0) {  // names no patch: counts nothing
    if (lane_of() == 0) partial[r] = 0;
    if (slope)
      for (int x = lane_of(); x < X; x += 32) slope[r * X + x] = T(0.0f);
    return;
  }
  const int64_t b = which / p.patches, n = which % p.patches;
  const uint8_t* corner = p.images + b * p.stride_b + (n / p.across) * (p.patch * p.stride_h) +
                          (n % p.across) * (p.patch * p.stride_w);

  float t[CHUNKS][EIGHT];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (const int x = (c * 32 + lane_of()) * EIGHT; x < X) target_of<WIDE>(p, corner, x, X, t[c]);
  if (per_patch) {  // two passes over registers: a difference of large sums would lose small deviations
    float sum = 0, squares = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < EIGHT; i++)
        if ((c * 32 + lane_of()) * EIGHT + i < X) sum += t[c][i];
    const float mean = over_lanes(sum, Add{}) / X;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < EIGHT; i++)
        if ((c * 32 + lane_of()) * EIGHT + i < X) {
          t[c][i] -= mean;
          squares += t[c][i] * t[c][i];
        }
    const float deviation = sqrtf(over_lanes(squares, Add{}) / (X - 1) + 1e-6f);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < EIGHT; i++) t[c][i] /= deviation;
  }

  float loss = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int x = (c * 32 + lane_of()) * EIGHT;
    if (x >= X) break;
    float rebuilt[EIGHT], gradient[EIGHT];
    load_eight<WIDE>(prediction + r * stride_r + x, X - x, rebuilt);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
      const float d = WIDE || x + i < X ? rebuilt[i] - t[c][i] : 0.0f;
      const float sign = d > 0 ? 1.0f : d < 0 ? -1.0f : d;  // d itself where it is 0 or not a number
      loss += (l1 ? fabsf(d) : 0.0f) + (mse ? d * d : 0.0f);
      gradient[i] = (l1 ? sign : 0.0f) + (mse ? 2 * d : 0.0f);
    }
    if (slope) store_eight<WIDE>(slope + r * X + x, X - x, gradient);
  }
  loss = over_lanes(loss, Add{});
  if (lane_of() == 0) partial[r] = loss;
}

void pixel_loss(const Tensor& prediction, const Tensor& images, const Tensor& rows, const Tensor& partial,
                const Tensor& slope, int64_t patch, std::vector<double> scale, std::vector<double> shift, bool l1,
                bool mse, bool per_patch) {
  const Place place(prediction);
  const int64_t R = prediction.size(0), X = prediction.size(1), stride_r = prediction.stride(0);
  STD_TORCH_CHECK(X == 3 * patch * patch && X <= 4096, "expected rows of 3 patch^2 <= 4096 values; got ", X);
  Pixels p{};
  p.images = data<const uint8_t>(images);
  p.stride_b = images.stride(0), p.stride_h = images.stride(1), p.stride_w = images.stride(2);
  p.stride_c = images.stride(3);
  p.patch = int(patch);
  p.across = int(images.size(2) / patch);
  p.patches = p.across * int(images.size(1) / patch);
  for (int i = 0; i < 3; i++) p.scale[i] = float(scale[i]), p.shift[i] = float(shift[i]);
  with_floating(prediction, [&](auto value) {
    using T = decltype(value);
    T* out = slope.numel() ? data<T>(slope) : nullptr;
    const int64_t bytes = sizeof(T);
    const bool wide = p.stride_w == 3 && p.stride_c == 1 && divides(8, p.images, {3 * patch, p.stride_b, p.stride_h}) &&
                      divides(16, data<T>(prediction), {stride_r * bytes, X * bytes}) && divides(16, out, {});
    const auto run = [&](auto kernel) {
      launch("masked_pixel_loss", place, kernel, dim3(unsigned((R + WARPS - 1) / WARPS)), 32 * WARPS, 0,
             data<const T>(prediction), data<const int32_t>(rows), data<float>(partial), out, R, int(X), stride_r, p,
             l1, mse, per_patch);
    };
    if (!wide) return run(pixel_loss_kernel<T, 16, false>);
    run(X <= 3 * 256 ? pixel_loss_kernel<T, 3, true> : pixel_loss_kernel<T, 16, true>);
  });
}

}  // namespace
}  // namespace mvle

MVLE_SCHEMAS(m) {
  m.def(
      "masked_pixel_loss(Tensor prediction, Tensor images, Tensor rows, Tensor(a!) partial, Tensor(b!) slope, "
      "int patch, float[] scale, float[] shift, bool l1, bool mse, bool per_patch) -> ()");
}

MVLE_FUNCTIONS(m) { m.impl("masked_pixel_loss", TORCH_BOX(&mvle::pixel_loss)); }
