"""What kernels for x86 share."""
