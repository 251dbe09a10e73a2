"""What tests share: small models and runs, oracles, recorded cases; no test is here."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
