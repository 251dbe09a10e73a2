"""What a server is refused before any weight is read."""

from __future__ import annotations

import dataclasses
import re

import pytest

from moe_jax.config.model import RopeConfig
from moe_jax.errors import UserError
from moe_jax.serving.device_state import cache_bytes
from moe_jax.serving.engine_size import EngineSize
from moe_jax.serving.room import check_room
from tests.support.small_models import case, make_plan


def test_a_cache_that_does_not_fit_is_refused_with_one_that_does() -> None:
    plan = make_plan(case("experts"), {})
    whole, least = (EngineSize(64, 1024, tokens) for tokens in (None, 1024))
    needed = cache_bytes(plan, whole)
    # 3 layers of 4 heads of keys and values of 4 numbers in f32, for all tokens and one block.
    assert needed == 3 * 4 * 2 * 4 * 4 * (64 * 1024 + 64)
    check_room(plan, whole, 10**9)
    with pytest.raises(UserError, match="give --cache-tokens") as refused:
        check_room(plan, whole, needed)
    found = re.search(r"--cache-tokens (\d+)", str(refused.value))
    assert found is not None
    check_room(plan, dataclasses.replace(whole, cache_tokens=int(found[1])), needed)
    with pytest.raises(UserError, match="lower --max-context, or lower --max-batch"):
        check_room(plan, least, 10**5)


def test_positions_that_depend_on_other_texts_are_refused() -> None:
    data = case("experts")
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_length=32)
    data = data._replace(model=dataclasses.replace(data.model, rope=rope))
    plan = make_plan(data, {})
    check_room(plan, EngineSize(2, 32), None)
    with pytest.raises(UserError, match=r"--max-context 33: beyond 32 .* use --max-context 32\."):
        check_room(plan, EngineSize(2, 33), None)
