"""Shape annotations (jaxtyping), or placeholders that mean nothing where it is not installed.

The operations and the benchmark must import on machines that have jax, flax and numpy alone; the
tests install jaxtyping and check every annotation at run time. Names follow the legend in
docs/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt
    except ModuleNotFoundError:

        class _Unchecked:
            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Array = Any
        Bool = Float = Int = Key = Shaped = UInt = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped", "UInt"]
