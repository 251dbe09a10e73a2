"""The families of models that can be read and written, one small file each."""

from __future__ import annotations

from moe_jax.hf.families import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moe_jax.hf.families.base import Family

_MODULES = (
    qwen3_moe,
    qwen2_moe,
    mixtral,
    olmoe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    qwen3,
    mistral,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
