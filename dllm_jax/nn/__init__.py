"""Parameter names and shapes, thin Linen: one file an architecture."""
