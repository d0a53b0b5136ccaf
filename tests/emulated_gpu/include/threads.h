/* The threads of a block, one after the other, and what the threads of a warp do together.
 *
 * Each thread has a stack of its own and runs until it ends or reaches an instruction of its warp, where the next one goes on. The
 * last thread of the warp to arrive computes the result for all. Source of the layouts: NVIDIA, PTX ISA, "Matrix Fragments for
 * mma.m16n8k32", "... mma.m16n8k16" and "... mma.m16n8k8".
 */
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx;

enum { WARP = 32, STACK = 128 * 1024 };

struct Warp {
    int a[WARP][4], b[WARP][2], c[WARP][4];
    unsigned arrived = 0, finished = 0;
};
struct Thread {
    Index index;
    Warp *warp;
    unsigned lane;
    bool ended = false;
    std::vector<char> stack;
    ucontext_t context;
};

static ucontext_t scheduler;
static Thread *current;
static const std::function<void()> *body;
static unsigned long progress; /* threads that ended and instructions of warps that were executed */

static void run_thread() {
    (*body)();
    current->ended = true;
    ++progress;
}

static inline void emulate_block(const unsigned *size, const std::function<void()> &kernel) {
    body = &kernel;
    unsigned count = size[0] * size[1] * size[2];
    std::vector<Warp> warps((count + WARP - 1) / WARP);
    std::vector<Thread> threads(count);
    for (unsigned i = 0; i < count; ++i) {
        Thread &thread = threads[i];
        thread.index = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
        thread.warp = &warps[i / WARP];
        thread.lane = i % WARP;
    }
    for (bool left = true; left;) {
        unsigned long before = progress;
        left = false;
        for (Thread &thread : threads) {
            if (thread.ended) continue;
            left = true;
            threadIdx = thread.index;
            current = &thread;
            if (thread.stack.empty()) {
                thread.stack.resize(STACK);
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.data();
                thread.context.uc_stack.ss_size = thread.stack.size();
                thread.context.uc_link = &scheduler;
                makecontext(&thread.context, run_thread, 0);
            }
            swapcontext(&scheduler, &thread.context);
        }
        if (left && progress == before) {
            fprintf(stderr, "emulated GPU: threads wait for others of their warp that never come\n");
            abort();
        }
    }
}

/* Waits until all threads of the warp are here; the last one calls compute. */
static inline void with_warp(void (*compute)(Warp &)) {
    Thread *self = current;
    Warp &warp = *self->warp;
    unsigned number = warp.finished;
    if (++warp.arrived == WARP) {
        compute(warp);
        warp.arrived = 0;
        ++warp.finished;
        ++progress;
    }
    while (warp.finished == number) swapcontext(&self->context, &scheduler);
}

/* The operands of an mma with 16 rows and 8 columns, in words. Row of an element of a: lane / 4, and 8 more for every second word;
 * column of an element of b: lane / 4. A word holds neighbours along the depth, of which lane % 4 has the first ones. Rows of c:
 * lane / 4 and 8 more; columns: 2 * (lane % 4) and the next one.
 */
template <int DEPTH, typename Element>
static void fragments(const Warp &warp, Element element, double (*a)[DEPTH], double (*b)[8]) {
    constexpr int IN_WORD = Element::IN_WORD, HELD = DEPTH / IN_WORD / 4;
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 2 * HELD * IN_WORD; ++i) {
            int part = i / IN_WORD, k = lane % 4 * IN_WORD + i % IN_WORD;
            a[lane / 4 + part % 2 * 8][k + part / 2 * 4 * IN_WORD] = element.first(warp.a[lane][part], i % IN_WORD);
            if (i < HELD * IN_WORD)
                b[k + part * 4 * IN_WORD][lane / 4] = element.second(warp.b[lane][part], i % IN_WORD);
        }
}

struct Codes {
    enum { IN_WORD = 4 };
    static double first(int word, int index) { return (double)((unsigned)word >> 8 * index & 255); }
    static double second(int word, int index) { return (double)(signed char)((unsigned)word >> 8 * index & 255); }
};
struct Halves {
    enum { IN_WORD = 2, SMALLEST = -14 };
    static double first(int word, int index) {
        unsigned short bits = (unsigned)word >> 16 * index;
        _Float16 value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    static double second(int word, int index) { return first(word, index); }
};
struct Bfloats {
    enum { IN_WORD = 2, SMALLEST = -126 };
    static double first(int word, int index) {
        unsigned bits = (unsigned)word >> 16 * index << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    static double second(int word, int index) { return first(word, index); }
};

static void multiply_codes(Warp &warp) {
    double a[16][32], b[32][8];
    fragments<32>(warp, Codes(), a, b);
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 32; ++k)
                warp.c[lane][i] += (int)(a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2]);
}

/* How a tensor core adds floats, by the coarsest model that was found (NVIDIA V100; Fasi, Higham, Mikaitis and Pranesh, "Numerical
 * behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021): the sum and four exact products are aligned to the largest
 * exponent, each is cut off behind 23 bits of fraction, and their sum is cut off to a float. Exponents of operands below the
 * smallest normal number, zeros included, count as its own.
 */
enum { ADDED_AT_ONCE = 4, FRACTION = 23 };

static int exponent_of(double value, int smallest) { return value == 0 ? smallest : std::max(std::ilogb(value), smallest); }

static float add_products(float sum, const double *a, const double *b, int smallest) {
    double terms[ADDED_AT_ONCE + 1] = {sum}, total = 0;
    int largest = exponent_of(sum, -126);
    for (int i = 0; i < ADDED_AT_ONCE; ++i) {
        terms[i + 1] = a[i] * b[i];
        largest = std::max(largest, exponent_of(a[i], smallest) + exponent_of(b[i], smallest));
    }
    for (double term : terms)
        if (!std::isfinite(term)) return (float)(sum + a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]);
    for (double term : terms) total += std::trunc(std::ldexp(term, FRACTION - largest));
    total = std::ldexp(total, largest - FRACTION);
    float rounded = (float)total;
    return std::fabs(rounded) > std::fabs(total) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <int DEPTH, typename Element> static void multiply_floats(Warp &warp) {
    double a[16][DEPTH], b[DEPTH][8];
    fragments<DEPTH>(warp, Element(), a, b);
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
            float sum;
            double column[DEPTH];
            memcpy(&sum, &warp.c[lane][i], sizeof sum);
            for (int k = 0; k < DEPTH; ++k) column[k] = b[k][lane % 4 * 2 + i % 2];
            for (int k = 0; k < DEPTH; k += ADDED_AT_ONCE)
                sum = add_products(sum, a[lane / 4 + i / 2 * 8] + k, column + k, Element::SMALLEST);
            memcpy(&warp.c[lane][i], &sum, sizeof sum);
        }
}

/* An instruction of the warp: operands in, compute for all threads, sums out. */
template <typename Sum>
static void with_operands(Sum *const (&c)[4], const int *a, int a_count, const int *b, int b_count, void (*compute)(Warp &)) {
    Thread *self = current;
    Warp &warp = *self->warp;
    for (int i = 0; i < 4; ++i) memcpy(&warp.c[self->lane][i], c[i], sizeof(int));
    for (int i = 0; i < a_count; ++i) warp.a[self->lane][i] = a[i];
    for (int i = 0; i < b_count; ++i) warp.b[self->lane][i] = b[i];
    with_warp(compute);
    for (int i = 0; i < 4; ++i) memcpy(c[i], &warp.c[self->lane][i], sizeof(int));
}

#define MMA_OF_SIX(name, Sum, compute)                                                                             \
    static inline void emulate_mma_sync_aligned_##name(Sum &c0, Sum &c1, Sum &c2, Sum &c3, int a0, int a1, int a2, \
                                                       int a3, int b0, int b1) {                                   \
        int a[] = {a0, a1, a2, a3}, b[] = {b0, b1};                                                                \
        with_operands<Sum>({&c0, &c1, &c2, &c3}, a, 4, b, 2, compute);                                             \
    }
MMA_OF_SIX(m16n8k32_row_col_s32_u8_s8_s32, int, multiply_codes)
MMA_OF_SIX(m16n8k16_row_col_f32_f16_f16_f32, float, (multiply_floats<16, Halves>))
MMA_OF_SIX(m16n8k16_row_col_f32_bf16_bf16_f32, float, (multiply_floats<16, Bfloats>))

static inline void emulate_mma_sync_aligned_m16n8k8_row_col_f32_f16_f16_f32(float &c0, float &c1, float &c2, float &c3,
                                                                             int a0, int a1, int b0) {
    int a[] = {a0, a1}, b[] = {b0};
    with_operands<float>({&c0, &c1, &c2, &c3}, a, 2, b, 1, (multiply_floats<8, Halves>));
}
