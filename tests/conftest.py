"""Settings that every test shares: eight simulated CPU devices, and annotations that are checked at
run time.

The package's annotations name shapes and dtypes; jaxtyping's import hook makes each call check
them. It must be installed before any module of the package is imported.
"""

from __future__ import annotations

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little. An unoptimised back end halves their time, and the way in
# which XLA:CPU emitted fusions before halves the rest; jaxlib 0.11 no longer has it, and aborts at
# flags that it does not know. `make test-optimised` sets OPTIMISED: the compiler as users have it.
if not os.environ.get("OPTIMISED"):
    FLAGS = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):
        FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "NPROC", "32"
)  # threads for eight devices to wait in: see moe_jax.runtime.devices
# XLA is as quiet as in commands: on some processors it complains of each program that it reads.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["MOE_JAX_CACHE"] = ""  # commands keep no compiled programs; what follows does

import jax
import jaxtyping
import pytest

from tests.support import ROOT

jax.config.update("jax_num_cpu_devices", 8)
# Many tests compile the same programs; those of the last run are there too.
# (With a limit to its size JAX looks at every file for each that it writes.)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache/programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

CHECKED = (
    *("ops", "moe", "placement", "parallel", "models"),
    *("inference.engine", "inference.session"),
    *("training.gradients", "training.optimizer", "training.state", "training.step"),
)
jaxtyping.install_import_hook([f"moe_jax.{name}" for name in CHECKED], "beartype.beartype")


MAPS, MOST_MAPS = Path("/proc/self/maps"), 25_000  # Linux allows a process 65,530 by default


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """XLA:CPU keeps some ten memory maps for each compiled program; out of them, its compiler
    crashes.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """A shell starts what runs in the background with SIGINT ignored, which tests of Ctrl-C are
    not.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """No test leaves a handler behind, which the next ones, or pytest itself, would run into."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def strict_promotion():
    """Mixing dtypes raises, as it should in code that means what it says. (Optax mixes them, so
    this is not for all tests.)
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked, to see what the code itself does with an argument that they
    forbid.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of whole runs keep what they share: see tiny_run.py."""
    path = tmp_path_factory.getbasetemp() / "tiny"
    path.mkdir(exist_ok=True)
    return path
