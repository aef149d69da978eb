// Tiny kernels, right ones and wrong ones, for test_emulated.py: each is called by its name, with the seed first, and
// returns what was found wrong, or null.
#include "warp.cuh"

using namespace mvle;

namespace {

std::string found;

template <class F>
const char* run(const char* name, uint64_t seed, unsigned blocks, unsigned threads, size_t shared, const F& kernel) {
  try {
    emulated::machine.run(name, dim3(blocks), threads, shared, kernel, seed);
    return nullptr;
  } catch (const std::runtime_error& error) {
    found = error.what();
    return found.c_str();
  }
}

}  // namespace

#define TEST_KERNEL extern "C" __attribute__((visibility("default"))) const char*

// ---- the order of threads --------------------------------------------------------------------------------------------

// Lists threads as they come to their turn, before a barrier and behind it.
TEST_KERNEL turns(uint64_t seed, int* out, int threads) {
  int at = 0;
  return run("turns", seed, 1, threads, 0, [&] {
    out[at++] = threadIdx.x;
    __syncthreads();
    out[at++] = threadIdx.x;
  });
}

// Lists blocks as they come to their turn.
TEST_KERNEL turns_of_blocks(uint64_t seed, int* out) {
  int at = 0;
  return run("turns_of_blocks", seed, 5, 1, 0, [&] { out[at++] = blockIdx.x; });
}

// Each thread reads what its neighbour wrote.
TEST_KERNEL neighbours(uint64_t seed, float* out, int threads, int with_barrier) {
  return run("neighbours", seed, 2, threads, threads * 4, [&] {
    float* shared = shared_as<float>();
    shared[threadIdx.x] = float(threadIdx.x);
    if (with_barrier) __syncthreads();
    out[blockIdx.x * threads + threadIdx.x] = shared[(threadIdx.x + 1) % threads];
  });
}

// Sums of a block, twice through the same room: without a barrier between them the second overtakes the first.
TEST_KERNEL two_sums(uint64_t seed, const float* in, float* out, int threads) {
  return run("two_sums", seed, 1, threads, 32 * 4, [&] {
    const float value = in[threadIdx.x];
    out[threadIdx.x] = over_block(value, Add{}, shared_as<float>());
    out[threads + threadIdx.x] = over_block(value, Highest{}, shared_as<float>());
  });
}

TEST_KERNEL sum_of_groups(uint64_t seed, const float* in, float* out) {
  return run("sum_of_groups", seed, 1, 32, 0, [&] { out[threadIdx.x] = over_lanes<8>(in[threadIdx.x], Add{}); });
}

// ---- who does not come -----------------------------------------------------------------------------------------------

TEST_KERNEL barrier_for_some(uint64_t seed, int threads, int some) {
  return run("barrier_for_some", seed, 1, threads, 0, [&] {
    if (int(threadIdx.x) < some) __syncthreads();
  });
}

TEST_KERNEL early_exit(uint64_t seed, int who) {
  return run("early_exit", seed, 3, 64, 0, [&] {
    if (blockIdx.x == 1 && int(threadIdx.x) == who) return;
    __syncthreads();
  });
}

// One warp at a barrier, another in a shuffle that a lane of its own leaves out.
TEST_KERNEL barrier_and_shuffle(uint64_t seed) {
  return run("barrier_and_shuffle", seed, 1, 64, 0, [&] {
    if (threadIdx.x < 40) __syncthreads();
    else __shfl_sync(ALL_LANES, 1, 0);
  });
}

TEST_KERNEL shuffle(uint64_t seed, int* out, int threads, unsigned mask, int lane) {
  return run("shuffle", seed, 1, threads, 0, [&] {
    out[threadIdx.x] = __shfl_sync(mask, int(threadIdx.x), lane);
  });
}

TEST_KERNEL different_operations(uint64_t seed) {
  return run("different_operations", seed, 1, 32, 0, [&] {
    if (threadIdx.x % 2) __syncwarp();
    else __shfl_xor_sync(ALL_LANES, 1, 2);
  });
}

TEST_KERNEL different_masks(uint64_t seed) {
  return run("different_masks", seed, 1, 32, 0, [&] { __syncwarp(threadIdx.x < 16 ? 0xffff : ALL_LANES); });
}

// ---- memory ----------------------------------------------------------------------------------------------------------

TEST_KERNEL write_behind(uint64_t seed, int bytes, int behind) {
  return run("write_behind", seed, 1, 1, bytes, [&] { shared_as<unsigned char>()[bytes + behind] = 1; });
}

// The first block writes shared memory, the second reads it.
TEST_KERNEL inherit(uint64_t seed, float* out) {
  return run("inherit", seed, 2, 32, 32 * 4, [&] {
    if (blockIdx.x == 0) shared_as<float>()[threadIdx.x] = 1;
    else out[threadIdx.x] = shared_as<float>()[threadIdx.x];
  });
}

TEST_KERNEL vectors(uint64_t seed, unsigned char* at, int what) {
  return run("vectors", seed, 1, 32, 64, [&] {
    if (threadIdx.x) return;
    uint32_t word[2];
    if (what == 0) load16(at);
    if (what == 1) store16(at, Sixteen{});
    if (what == 2) load8(at, word);
    if (what == 3) copy16_async(shared_as<unsigned char>(), at, true);
    if (what == 4) copy16_async(at, shared_as<unsigned char>(), true);
  });
}

// Sixteen bytes from nowhere are zeros.
TEST_KERNEL copy_nothing(uint64_t seed, float* out) {
  return run("copy_nothing", seed, 1, 1, 16, [&] {
    copy16_async(shared_as<float>(), nullptr, false);
    copies_done();
    __syncthreads();
    for (int i = 0; i < 4; i++) out[i] = shared_as<float>()[i];
  });
}

TEST_KERNEL nothing(uint64_t seed, int threads, int bytes) {
  return run("nothing", seed, 1, threads, bytes, [] {});
}

// ---- products --------------------------------------------------------------------------------------------------------

// d [16, 8] = a [16, 16] b [16, 8], in bfloat16: fragments by ldmatrix, or value by value as warp.cuh describes them.
TEST_KERNEL product(uint64_t seed, const BFloat16* a, const BFloat16* b, float* d, int by_hand) {
  return run("product", seed, 1, 32, (16 * 16 + 16 * 8) * 2, [&] {
    BFloat16* left = shared_as<BFloat16>();
    BFloat16* right = left + 16 * 16;
    const int lane = lane_of(), g = lane / 4, t = lane % 4;
    for (int i = lane; i < 16 * 16; i += 32) left[i] = a[i];
    for (int i = lane; i < 16 * 8; i += 32) right[i] = b[i];
    __syncthreads();
    uint32_t of_a[4], of_b[4];
    if (by_hand) {
      const auto both = [](BFloat16 low, BFloat16 high) { return pack<BFloat16>(float(low), float(high)); };
      for (int i = 0; i < 4; i++) {
        const BFloat16* pair = left + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        of_a[i] = both(pair[0], pair[1]);
      }
      for (int i = 0; i < 2; i++) of_b[i] = both(right[(2 * t + 8 * i) * 8 + g], right[(2 * t + 1 + 8 * i) * 8 + g]);
    } else {
      load_matrices<false>(of_a, left + lane % 16 * 16 + lane / 16 * 8);
      load_matrices<true>(of_b, right + lane % 16 * 8);  // two matrices; those of the upper lanes are not used
    }
    float sum[4] = {};
    multiply_add<BFloat16>(sum, of_a, of_b[0], of_b[1]);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
  });
}

TEST_KERNEL product_of_half_a_warp(uint64_t seed) {
  return run("product_of_half_a_warp", seed, 1, 32, 0, [&] {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x < 16) multiply_add<Half>(d, a, 0, 0);
  });
}

TEST_KERNEL matrices_of_global_memory(uint64_t seed, const BFloat16* a) {
  return run("matrices_of_global_memory", seed, 1, 32, 1024, [&] {
    uint32_t to[4];
    load_matrices<false>(to, a);
  });
}
