"""Checkpoints: Orbax arrays with checksums, written whole or not at all, restored onto any mesh and
placement.
"""
