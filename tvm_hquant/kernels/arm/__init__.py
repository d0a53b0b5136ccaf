"""What kernels for AArch64 share."""
