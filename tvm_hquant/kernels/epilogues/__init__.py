"""The ends of kernels: from sums to stored outputs."""
