"""Convolutions and dense layers: tiles, their costs and order, the copies they read, how constants are packed."""
