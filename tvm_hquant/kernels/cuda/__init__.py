"""What kernels for CUDA share."""
