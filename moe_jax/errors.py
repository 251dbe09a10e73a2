"""The one exception whose text is meant for a person: the command line prints it alone and exits
with 2.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can correct: one sentence that names the field, the value and the
    remedy.
    """


class CorruptCheckpoint(UserError):
    """A checkpoint whose bytes are not those that were written, or that is not whole; names the
    file.
    """
