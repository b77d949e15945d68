"""Matrices that are known by their products, and what products tell of them."""
