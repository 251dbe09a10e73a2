"""What environment.json says of a run: versions, devices, commit."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from moe_jax import __version__
from moe_jax.config.schema import Config
from moe_jax.tracking.metrics import NATS, QUANTILE_LOSS

RECORDED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
)


def describe_environment(config: Config, **measured: Any) -> dict[str, Any]:
    """What environment.json holds: versions, devices and commit, and whatever else was `measured`
    (see docs/metrics.md).
    """
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "moe-jax": __version__,
            **{name: metadata.version(name) for name in RECORDED_PACKAGES},
        },
        "platform": jax.default_backend(),
        "devices": [
            f"{device.id}: {device.device_kind}" for device in jax.devices()[: config.mesh.size]
        ],
        "mesh": dataclasses.asdict(config.mesh),
        "git_commit": _git_commit(),
        "loss_unit": QUANTILE_LOSS if config.model.forecasts else NATS,
        **measured,
    }


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from, or None."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
