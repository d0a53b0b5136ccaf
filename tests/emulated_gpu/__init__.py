"""A GPU without hardware: CUDA kernels compiled as C++ and run thread after thread on this machine's CPU.

``nvcc.py`` stands for nvcc, ``driver.c`` for NVIDIA's driver and runtime library. Everything between is real: the source that
TVM generates, its launch parameters, the library that is exported, and TVM's CUDA runtime that loads and runs it. It shows
that the kernels compute what they should. It cannot show what the real compiler makes of them, nor races between threads:
kernels that share memory between threads are refused.
"""
