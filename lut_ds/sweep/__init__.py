"""Sweeps: many runs of one recipe with changes, each trained by the engine and evaluated, and one table of them."""
