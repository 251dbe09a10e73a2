"""How a configuration section is declared: a frozen dataclass whose fields carry their help text
and bounds.

Only the standard library is needed here. Bounds and combinations are checked on construction;
errors are `UserError`s that name the field, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, dataclass_transform

from moe_jax.errors import UserError


class PathTo(NamedTuple):
    """Marks a setting that names a file or folder: `load.py` makes it absolute."""

    words: str = ""
    """Pattern of what may stand in the place of a path, such as `builtin`."""
    hub: bool = False
    """Whether `org/name` is a model on the hub where no such folder exists."""


def setting(
    *,
    default: Any,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    path: PathTo | None = None,
) -> Any:
    """A field with a default, its help text, and the closed or open bounds of its value."""
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def bounds_text(metadata: Any) -> str:
    """The bounds of a field as text (`>= 1, <= 2`), empty when it has none."""
    symbols = {"ge": ">=", "gt": ">", "le": "<="}
    return ", ".join(
        f"{symbol} {metadata[key]}"
        for key, symbol in symbols.items()
        if metadata.get(key) is not None
    )


def _validate(section: Any) -> None:
    """Refuses values out of their bounds, then combinations that the section itself refuses."""
    for field in dataclasses.fields(section):
        value, bounds = getattr(section, field.name), field.metadata
        if (
            value is None
            or isinstance(value, (str, bool, tuple))
            or dataclasses.is_dataclass(value)
        ):
            continue
        inside = (
            (bounds["ge"] is None or value >= bounds["ge"])
            and (bounds["gt"] is None or value > bounds["gt"])
            and (bounds["le"] is None or value <= bounds["le"])
        )
        if not inside:
            raise UserError(
                f"{section.SECTION}{field.name}={value!r} is out of range: it must be "
                f"{bounds_text(bounds)}."
            )
    if hasattr(section, "check"):
        section.check()


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(cls: type) -> type:
    """Makes a frozen keyword-only dataclass whose bounds are checked on construction, and after
    them its own `check`, if it has one.
    """
    if hasattr(cls, "__post_init__"):
        raise TypeError(f"{cls.__name__} has a __post_init__: name it check.")
    cls.__post_init__ = _validate  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)
