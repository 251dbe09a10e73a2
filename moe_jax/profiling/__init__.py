"""Measuring: time without compiling, memory, FLOPs, what a compiled program holds, what this
machine can do.
"""
