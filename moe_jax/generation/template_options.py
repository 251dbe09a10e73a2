"""What a conversation's chat template is told. Needs the standard library alone: a command reads it
before JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.data.chat_template import ChatTemplate


@dataclass(frozen=True)
class TemplateOptions:
    """Variables of a template, and the switch for reasoning that each names in its own way."""

    thinking: bool | None = None
    """Whether the model is to reason first; None leaves it to the template."""
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, template: ChatTemplate) -> dict[str, Any]:
        """The variables for a template. Raises UserError for those that it does not use."""
        template.check_variables(self.variables)
        switch = {} if self.thinking is None else template.thinking(self.thinking)
        return {**switch, **self.variables}


NOTHING_SAID = TemplateOptions()
