"""Products of matrices that are activations both."""
