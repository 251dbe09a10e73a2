"""The mixture-of-experts layer: route, dispatch, compute, combine. Needs jax, flax and numpy
alone.
"""
