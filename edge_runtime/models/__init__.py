"""Base models: their sources, families, facts, depth slices and weights."""
