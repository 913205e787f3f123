"""4-bit operations for JAX: arrays in, arrays out, usable without the rest of this project."""
