"""A request's body, from its bytes to checked fields.

    body = read_body(CHAT, content)       # body.temperature; raises ApiError, status 400

Bytes may be anything: what is not UTF-8, not JSON, nested without end or NaN is refused here.
"""

from __future__ import annotations

import re
from typing import Any

import pydantic_core
from pydantic import ValidationError

from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.fields import FIELD_NAMES, ApiTable, range_text


def read_body(table: ApiTable, content: bytes) -> Any:
    """The fields of a body, as attributes; a field that is `null` is as one that is left out.

    Raises ApiError, which names the field.
    """
    try:
        data = pydantic_core.from_json(content, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_json")
    given = {name: value for name, value in data.items() if value is not None}
    try:
        return table.model.model_validate(given)
    except ValidationError as error:
        # Not chained: pydantic's text quotes what the request says.
        raise _refusal(table, error.errors(include_url=False)) from None


def _refusal(table: ApiTable, mistakes: list[Any]) -> ApiError:
    """The answer to the first wrong field: of several types that a value might have been of,
    the one that it came closest to.
    """
    first = mistakes[0]["loc"][0]
    mine = [mistake for mistake in mistakes if mistake["loc"][0] == first]
    mistake = max(mine, key=lambda one: len(one["loc"]))
    place, kind = mistake["loc"], mistake["type"]
    param = _path(place, unknown=kind == "extra_forbidden")
    field = table.named(first)
    if kind == "extra_forbidden":
        return ApiError(
            400,
            f"{param} is not a field that is known here.",
            param=param,
            code="unknown_parameter",
        )
    if kind == "missing":
        return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")
    if field is not None and field.refused:
        return ApiError(
            400,
            f"{param} is not supported: {field.about}",
            param=param,
            code="unsupported_parameter",
        )
    if len(mine) > 1 and max(len(one["loc"]) for one in mine) <= 2 and len(place) <= 2:
        schema = table.model.model_json_schema()["properties"][first]
        wanted = f"it must be {range_text(schema)}"
    else:
        text = str(mistake["msg"])
        wanted = text[:1].lower() + text[1:]
    return ApiError(
        400, f"{param} is {_shown(mistake['input'])}: {wanted}.", param=param, code="invalid_value"
    )


def _path(place: tuple[int | str, ...], unknown: bool) -> str:
    """`messages[0].content`; the steps by which pydantic names alternatives of a type are left
    out.
    """
    path = ""
    for number, step in enumerate(place):
        last = unknown and number == len(place) - 1
        if isinstance(step, int):
            path += f"[{step}]"
        elif last or step in FIELD_NAMES:
            path += f".{step}" if path else step
    return path[:200]


def _shown(value: Any) -> str:
    """A value as a message quotes it: short, on one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = re.sub(r"[^\x20-\x7e]", "?", repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
