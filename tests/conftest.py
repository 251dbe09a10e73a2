"""Settings that every test shares: eight simulated CPU devices."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
