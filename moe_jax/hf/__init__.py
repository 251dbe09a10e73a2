"""Hugging Face checkpoints in and out: config.json to our settings, safetensors to our parameter
tree, and back.

Each family of models is a name table and a config mapping in one small file under `families/`;
docs/adding_a_model.md shows how to add one. No pickle is loaded and no code of a checkpoint is run.
"""

from __future__ import annotations

from moe_jax.hf.checkpoint import Checkpoint, open_checkpoint
from moe_jax.hf.config import Architecture, eos_ids, is_hf_folder, read_config
from moe_jax.hf.config_writer import config_of
from moe_jax.hf.export import export
from moe_jax.hf.families import FAMILIES

__all__ = [
    "FAMILIES",
    "Architecture",
    "Checkpoint",
    "config_of",
    "eos_ids",
    "export",
    "is_hf_folder",
    "open_checkpoint",
    "read_config",
]
