// CUDA kernels on a CPU: the device code of this folder, compiled by the host's compiler and run for its results.
//
// A launch runs one block after another, from either end of the grid. The threads of a block are fibers of one CPU
// thread: each runs until it meets others (a barrier, or an operation of a warp), or ends, and then any other that can
// run goes on, drawn at random; in half of the blocks some warps are drawn far more often, so that they run ahead. What
// is drawn follows from `seed`. So what stands between two meetings happens in another order each time, and a missing
// barrier shows as a wrong result for some seed. Shared memory is NaN before each block and has guards behind it; lanes
// and threads that do not come to a meeting, or to another one, are errors with the place of each.
//
// What this cannot show, since it has one CPU thread and the CPU's memory:
//   - races between blocks beyond who comes first, and memory order: every write is seen at once, in the order of the program
//   - asynchronous copies: `copy16_async` copies when it is called, so a forgotten wait is not noticed; a forgotten
//     barrier is
//   - what a wrong `__restrict__` or a misaligned address of global memory does; alignment is checked where vectors are
//     read or written through numeric.cuh
//   - whether the layout of a matrix fragment is the hardware's: it is our reading of PTX, on both sides
//   - early exits before a barrier: hardware lets them pass; here they are errors
// Not there: sub-warp groups of their own layout, atomics, static __shared__ variables, clocks, printf, textures,
// wgmma, TMA, tcgen05. Results of float operations are the host's: no contraction unless the compiler is told so, and
// its exp2f, log2f in the place of the device's.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "longjmp between fibers is refused by fortified libraries: compile with -U_FORTIFY_SOURCE"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;        // bytes of a fiber; untouched pages cost nothing
constexpr size_t SHARED_LIMIT = 163 << 10;  // of a block, on the smallest architecture that is built (sm_80)
constexpr size_t GUARD = 4096;              // bytes of poison behind shared memory
constexpr unsigned char POISON = 0xff;      // NaN in every floating type, -1 in every integer

// What the lanes of a warp brought to a meeting. It lives until each of them has read it.
struct Meeting {
  unsigned char brought[WARP][64];
  int readers = 0;
};

enum class State { ready, at_barrier, at_meeting, ended };

struct Fiber {
  dim3 index;
  int number = 0, lane = 0;
  State state = State::ready;
  const char* where = nullptr;  // name of the operation that it waits in
  unsigned mask = 0;            // of the meeting
  unsigned char brings[64];
  Meeting* meeting = nullptr;
  jmp_buf context;
  ucontext_t start;
  bool begun = false;
  void* stack = nullptr;
};

// A block on its way, and what it runs on. One for each CPU thread that launches.
class Machine {
 public:
  dim3 block_index, block_size, grid_size;
  Fiber* current = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  bool noting = false;  // launches are noted in the place of being run
  std::string noted;    // a line each: name, threads, bytes of shared memory, blocks

  ~Machine() { forget(); }

  void run(const std::string& name, dim3 grid, unsigned threads, size_t bytes, std::function<void()> body,
           uint64_t seed) {
    if (threads == 0 || threads > 1024 || bytes > SHARED_LIMIT || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      throw std::runtime_error(name + ": no device takes a launch of " + std::to_string(threads) + " threads, " +
                               std::to_string(bytes) + " bytes of shared memory and a grid of " +
                               std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                               std::to_string(grid.z));
    if (noting) {
      noted += name + "\t" + std::to_string(threads) + "\t" + std::to_string(bytes) + "\t" +
               std::to_string(uint64_t{grid.x} * grid.y * grid.z) + "\n";
      return;
    }
    block_size = dim3(threads);
    grid_size = grid;
    body_ = std::move(body);
    random_.seed(seed);
    while (fibers_.size() < threads) fibers_.push_back(make());
    // as aligned as shared memory is, with nothing before it
    memory_.assign(bytes + GUARD + 128, 0);
    shared = memory_.data() + (128 - reinterpret_cast<uintptr_t>(memory_.data()) % 128) % 128;
    shared_bytes = bytes;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    // from either end: of two that write to one place, another wins
    const bool backwards = random_() % 2;
    for (uint64_t i = 0; i < blocks; i++) {
      const uint64_t n = backwards ? blocks - 1 - i : i;
      block_index = dim3(unsigned(n % grid.x), unsigned(n / grid.x % grid.y), unsigned(n / grid.x / grid.y));
      block(name);
    }
    body_ = nullptr;
  }

  // All threads of the block meet.
  void barrier() {
    current->state = State::at_barrier;
    current->where = "__syncthreads";
    waiting_++;
    if (waiting_ == block_size.x) {
      waiting_ = 0;
      for (unsigned t = 0; t < block_size.x; t++) wake(*fibers_[t]);
    }
    yield();
  }

  // The lanes in `mask` bring `size` bytes each and get what all brought. `where` names the operation: lanes that meet
  // must be in the same.
  Meeting* meet(const char* where, unsigned mask, const void* mine, size_t size) {
    Fiber& self = *current;
    if (!(mask >> self.lane & 1)) fail(std::string(where) + ": a lane names a mask without itself");
    std::memcpy(self.brings, mine, size);
    self.state = State::at_meeting;
    self.where = where;
    self.mask = mask;
    const unsigned first = self.number - self.lane;
    int there = 0, wanted = 0;
    for (int lane = 0; lane < WARP; lane++) {
      if (!(mask >> lane & 1)) continue;
      wanted++;
      if (first + lane >= block_size.x) fail(std::string(where) + ": the mask names a lane that the block lacks");
      const Fiber& other = *fibers_[first + lane];
      if (other.state != State::at_meeting) continue;
      if (other.where != where || other.mask != mask)
        fail("lanes of a warp meet in different operations: " + said(self) + "; " + said(other));
      there++;
    }
    if (there == wanted) {
      Meeting* meeting = take();
      meeting->readers = wanted;
      for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber& other = *fibers_[first + lane];
        std::memcpy(meeting->brought[lane], other.brings, size);
        other.meeting = meeting;
        wake(other);
      }
    }
    yield();
    return self.meeting;
  }

  bool is_shared(const void* address) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= shared && at < shared + shared_bytes + GUARD;
  }

  void leave(Meeting* meeting) {
    if (--meeting->readers == 0) idle_.push_back(meeting);
  }

  // Ends the launch with an error, from a fiber or from outside.
  [[noreturn]] void fail(const std::string& why) {
    error_ = why;
    _longjmp(scheduler_, 1);
  }

  std::string said(const Fiber& fiber) const {
    return "thread " + std::to_string(fiber.number) + " " +
           (fiber.state == State::ended ? std::string("has ended")
                                        : std::string("is in ") + (fiber.where ? fiber.where : "no operation"));
  }

 private:
  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> ready_;
  std::vector<unsigned char> memory_;
  std::vector<std::unique_ptr<Meeting>> meetings_;
  std::vector<Meeting*> idle_;
  std::mt19937_64 random_;
  int candidates_ = 1;                // of a draw
  uint64_t haste_[1024 / WARP] = {};  // of each warp
  unsigned waiting_ = 0, ended_ = 0;
  std::string error_;
  jmp_buf scheduler_;

  static std::unique_ptr<Fiber> make() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) throw std::bad_alloc();
    return fiber;
  }

  void forget() {
    for (auto& fiber : fibers_) munmap(fiber->stack, STACK);
    fibers_.clear();
  }

  Meeting* take() {
    if (idle_.empty()) {
      meetings_.push_back(std::make_unique<Meeting>());
      return meetings_.back().get();
    }
    Meeting* meeting = idle_.back();
    idle_.pop_back();
    return meeting;
  }

  void wake(Fiber& fiber) {
    fiber.state = State::ready;
    fiber.where = nullptr;
    ready_.push_back(fiber.number);
  }

  // Back to the scheduler, until it comes back here.
  void yield() {
    if (_setjmp(current->context) == 0) _longjmp(scheduler_, 2);
  }

  // What a fiber does for ever: thread after thread of block after block.
  void live() {
    for (;;) {
      body_();
      current->state = State::ended;
      ended_++;
      yield();
    }
  }

  static void enter(unsigned high, unsigned low) {
    reinterpret_cast<Machine*>(uint64_t{high} << 32 | low)->live();
  }

  // Which of those that are ready goes on: any, or of a few the one whose warp is ahead. Even chances alone would let
  // no warp come far enough to overtake another in what both do twice.
  size_t draw() {
    size_t best = random_() % ready_.size();
    for (int i = 1; i < candidates_; i++) {
      const size_t other = random_() % ready_.size();
      if (haste_[ready_[other] / WARP] > haste_[ready_[best] / WARP]) best = other;
    }
    return best;
  }

  void go(Fiber& fiber) {
    current = &fiber;
    if (fiber.begun) _longjmp(fiber.context, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    const auto self = reinterpret_cast<uint64_t>(this);
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 2, unsigned(self >> 32), unsigned(self));
    setcontext(&fiber.start);
  }

  void block(const std::string& name) {
    std::memset(shared, POISON, shared_bytes + GUARD);
    ready_.clear();
    candidates_ = random_() % 2 ? 1 : 8;
    for (uint64_t& haste : haste_) haste = random_();
    waiting_ = ended_ = 0;
    for (unsigned t = 0; t < block_size.x; t++) {
      Fiber& fiber = *fibers_[t];
      fiber.index = dim3(t, 0, 0);
      fiber.number = int(t);
      fiber.lane = int(t % WARP);
      wake(fiber);
    }
    switch (_setjmp(scheduler_)) {  // every fiber comes back to here
      case 1:
        stop(name);
      default:
        break;
    }
    if (!ready_.empty()) {
      const size_t drawn = draw();
      const unsigned t = ready_[drawn];
      ready_[drawn] = ready_.back();
      ready_.pop_back();
      go(*fibers_[t]);
    }
    if (ended_ < block_size.x) {
      error_ = "threads wait for others that do not come:";
      std::string last;
      for (unsigned t = 0; t < block_size.x; t++)
        if (std::string now = said(*fibers_[t]); t == 0 || now.substr(now.find(' ', 7)) != last) {
          error_ += (t ? "; " : " ") + now;
          last = now.substr(now.find(' ', 7));
        }
      stop(name);
    }
    for (size_t i = 0; i < GUARD; i++)
      if (shared[shared_bytes + i] != POISON) {
        error_ = "shared memory is written " + std::to_string(i) + " bytes behind its end";
        stop(name);
      }
  }

  [[noreturn]] void stop(const std::string& name) {
    // what stands on the fibers' stacks is lost with them: device code owns nothing
    forget();
    meetings_.clear();
    idle_.clear();
    body_ = nullptr;
    throw std::runtime_error(name + ", block " + std::to_string(block_index.x) + ": " + error_);
  }
};

inline thread_local Machine machine;
inline uint64_t seed = 0;  // of the next launch; each launch after it has another

// Bytes that vectors (numeric.cuh) have read of global memory: whether a kernel reads as often as it says.
inline uint64_t bytes_read = 0;
extern "C" inline __attribute__((used, visibility("default"))) uint64_t mvle_emulated_bytes_read() { return bytes_read; }

// For whoever loads a library of emulated kernels: the same order of threads again, or another.
extern "C" inline __attribute__((used, visibility("default"))) void mvle_emulated_seed(uint64_t of_the_next_launch) {
  seed = of_the_next_launch;
}

// From here on launches are noted alone; and what was noted since, with which they run again. The text lives until the
// next call.
extern "C" inline __attribute__((used, visibility("default"))) void mvle_emulated_note() {
  machine.noting = true;
  machine.noted.clear();
}

extern "C" inline __attribute__((used, visibility("default"))) const char* mvle_emulated_noted() {
  machine.noting = false;
  return machine.noted.c_str();
}

template <class T>
struct Brought {
  static_assert(sizeof(T) <= 64);
  Meeting* meeting;
  Brought(const char* where, unsigned mask, const T& mine) : meeting(machine.meet(where, mask, &mine, sizeof(T))) {}
  ~Brought() { machine.leave(meeting); }
  Brought(const Brought&) = delete;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, meeting->brought[lane], sizeof(T));
    return value;
  }
};

template <class T>
T from_lane(const char* where, unsigned mask, const T& mine, int lane) {
  if (lane < 0 || lane >= WARP || !(mask >> lane & 1))
    machine.fail(std::string(where) + " reads lane " + std::to_string(lane) + ", which is not in the mask");
  Brought<T> all(where, mask, mine);
  return all[lane];
}

}  // namespace emulated

#define threadIdx (emulated::machine.current->index)
#define blockIdx (emulated::machine.block_index)
#define blockDim (emulated::machine.block_size)
#define gridDim (emulated::machine.grid_size)

inline void __syncthreads() { emulated::machine.barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::Brought<char> all("__syncwarp", mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated::from_lane("__shfl_sync", mask, value, lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulated::from_lane("__shfl_xor_sync", mask, value, emulated::machine.current->lane ^ with);
}
