"""`moe-jax ARGUMENTS` with a stdout that nobody reads any more, a fake model and no drawing.

python -m tests.support.closed_pipe ARGUMENTS
"""

from __future__ import annotations

import os
import sys

import pytest

from moe_jax.cli import main
from moe_jax.tracking import report
from tests.support import fake_model


def run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, sys.stdout.fileno())
    with pytest.MonkeyPatch.context() as patch:
        fake_model.install(patch, fake_model.Loaded(fake_model.shout))
        patch.setattr(report, "write_report", lambda place: place / "report.html")
        main.main(sys.argv[1:])


if __name__ == "__main__":
    run()
