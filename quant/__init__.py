"""Low-bit formats: layout, packing, reference, and the compiled vector layer that kernels are written in."""
