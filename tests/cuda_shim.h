// Enough of CUDA to run a kernel's text on the CPU, one block at a time.
//
// The threads of a block are fibers. A fiber runs until it has to wait for others, at a barrier or a
// shuffle; then the next one runs. A warp runs as far as it can before the next warp starts, and the
// order of warps and lanes can be reversed: of two accesses that no barrier separates, each comes
// first in one of the two orders, so that a missing barrier shows every time.
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#define __global__
#define __device__ static inline
// Shared memory has a section of its own, to be filled with NaN before every block.
#define __shared__ static __attribute__((section("shared")))
extern char __start_shared[] __attribute__((weak)), __stop_shared[] __attribute__((weak));

using std::max;
using std::min;

struct alignas(16) float4 { float x, y, z, w; };
static struct { unsigned x, y, z; } threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

namespace shim {

enum State { RUNNING, AT_SHUFFLE, AT_BARRIER, DONE };
struct Fiber {
    ucontext_t context;
    State state;
    unsigned long long given, taken;  // by a shuffle
    unsigned from;                    // the thread whose `given` is taken
    char stack[32 << 10];
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;

static void wait(State state)
{
    Fiber& me = fibers[threadIdx.x];
    me.state = state;
    swapcontext(&me.context, &scheduler);
}

static void fiber_main()
{
    body();
    fibers[threadIdx.x].state = DONE;  // and uc_link leads back to the scheduler
}

static bool all_in(State state, unsigned first, unsigned last)
{
    for (unsigned t = first; t < last; ++t) if (fibers[t].state != state) return false;
    return true;
}

// Runs the lanes of a warp until all wait at the barrier or are done; false if they cannot get there.
static bool run_warp(unsigned first, bool reverse)
{
    const unsigned last = first + 32;
    for (;;) {
        for (unsigned k = 0; k < 32; ++k) {
            const unsigned t = reverse ? last - 1 - k : first + k;
            if (fibers[t].state != RUNNING) continue;
            threadIdx.x = t;
            swapcontext(&scheduler, &fibers[t].context);
        }
        if (!all_in(AT_SHUFFLE, first, last)) break;
        for (unsigned t = first; t < last; ++t) fibers[t].taken = fibers[fibers[t].from].given;
        for (unsigned t = first; t < last; ++t) fibers[t].state = RUNNING;
    }
    return all_in(AT_BARRIER, first, last) || all_in(DONE, first, last);
}

static bool run_block(bool reverse)
{
    const unsigned threads = blockDim.x;
    memset(__start_shared, 0xff, __stop_shared - __start_shared);
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = sizeof fiber.stack;
        fiber.context.uc_link = &scheduler;
        fiber.state = RUNNING;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (;;) {
        for (unsigned k = 0; k < threads; k += 32)
            if (!run_warp(reverse ? threads - 32 - k : k, reverse)) return false;
        if (all_in(DONE, 0, threads)) return true;
        if (!all_in(AT_BARRIER, 0, threads)) return false;
        for (Fiber& fiber : fibers) fiber.state = RUNNING;
    }
}

template <typename T> static T read(void** args, int& i) { return *(T*)args[i++]; }

// 0: done; 1: other arguments than the kernel's; 2: some threads wait where others never come.
template <typename... A> int launch(void (*kernel)(A...), const int* grid, int threads, bool reverse,
                                    void** args, const int* sizes, int count)
{
    const int expected[] = {(int)sizeof(A)...};
    if (count != (int)sizeof...(A) || !std::equal(expected, expected + count, sizes)) return 1;
    int i = 0;
    const std::tuple<A...> values{read<A>(args, i)...};  // braces: evaluated from left to right
    body = [&] { std::apply(kernel, values); };
    fibers = std::vector<Fiber>(threads);
    blockDim = {(unsigned)threads, 1, 1};
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], 1};
    const int blocks = grid[0] * grid[1];
    for (int k = 0; k < blocks; ++k) {
        const int block = reverse ? blocks - 1 - k : k;
        blockIdx = {(unsigned)(block % grid[0]), (unsigned)(block / grid[0]), 0};
        if (!run_block(reverse)) return 2;
    }
    return 0;
}

}  // namespace shim

// The GPU's fast versions, whose last digits are not these: test_kernels_gpu.py compares those.
#define __expf expf
#define __fdividef(x, y) ((x) / (y))

static void __syncthreads() { shim::wait(shim::AT_BARRIER); }

template <typename T> T __shfl_xor_sync(unsigned, T value, int lanes)
{
    shim::Fiber& me = shim::fibers[threadIdx.x];
    memcpy(&me.given, &value, sizeof value);
    me.from = threadIdx.x ^ lanes;
    shim::wait(shim::AT_SHUFFLE);
    memcpy(&value, &me.taken, sizeof value);
    return value;
}
