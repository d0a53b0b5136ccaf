/* The threads of a block, one after the other, and what the threads of a warp do together.
 *
 * Each thread has a stack of its own and runs until it ends or reaches an instruction of its warp, where the next one goes on. The
 * last thread of the warp to arrive computes the result for all. Source of the layout: NVIDIA, PTX ISA, "Matrix Fragments for
 * mma.m16n8k32".
 */
#pragma once
#include <cstdio>
#include <cstdlib>
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

static inline int byte_of(int word, int index, bool is_signed) {
    unsigned value = (unsigned)word >> 8 * index & 255;
    return is_signed ? (signed char)value : (int)value;
}

/* Rows of a and c: lane / 4 and 8 more; columns of b and c: lane / 4, and 2 · (lane % 4) and the next one. */
static void multiply_u8_s8(Warp &warp) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 16; ++i) {
            int part = i / 4, k = lane % 4 * 4 + i % 4;
            a[lane / 4 + part % 2 * 8][k + part / 2 * 16] = byte_of(warp.a[lane][part], i % 4, false);
            if (i < 8) b[k + part * 16][lane / 4] = byte_of(warp.b[lane][part], i % 4, true);
        }
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 32; ++k)
                warp.c[lane][i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}

static inline void emulate_mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(
    int &c0, int &c1, int &c2, int &c3, int a0, int a1, int a2, int a3, int b0, int b1) {
    Thread *self = current;
    Warp &warp = *self->warp;
    int *c[] = {&c0, &c1, &c2, &c3}, a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    for (int i = 0; i < 4; ++i) warp.a[self->lane][i] = a[i], warp.c[self->lane][i] = *c[i];
    for (int i = 0; i < 2; ++i) warp.b[self->lane][i] = b[i];
    with_warp(multiply_u8_s8);
    for (int i = 0; i < 4; ++i) *c[i] = warp.c[self->lane][i];
}
