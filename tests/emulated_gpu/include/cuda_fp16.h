/* The type half, with one rounding from float, ties to even. */
#pragma once
typedef _Float16 __half;
typedef __half half;
struct __half2 {
    half x, y;
};
static inline float __half2float(half a) { return (float)a; }
static inline half __float2half(float a) { return (half)a; }
static inline half __float2half_rn(float a) { return (half)a; }
static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
