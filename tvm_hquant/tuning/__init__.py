"""Measured choices: tiles of kernel templates, schedules of what TVM computes; and the file that keeps them."""
