"""Pure functions on arrays; no Flax, no parameters of their own."""
