"""Attention over packed sequences, and over a cache: `api` chooses among back ends, a file each."""
