"""Measured choices among the tiles that kernel templates have, and the file that keeps them."""
