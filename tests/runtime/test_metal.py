"""Which plug-in a Mac computes with, and what is said where that cannot be."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

import jax
import pytest

from moe_jax.config.schema import DevicesConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.runtime import metal
from moe_jax.runtime.devices import check_platform, start_devices, use_devices, use_platform
from moe_jax.runtime.platform import default_platform, stand_in


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = jax.config.jax_platforms
    yield
    stand_in(None)
    jax.config.update("jax_platforms", before)


def a_mac(monkeypatch: pytest.MonkeyPatch, macos: str = "15.5", **versions: str) -> None:
    """This machine as a Mac with these packages; `_` stands for `-` in their names."""
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    monkeypatch.setattr(metal, "installed_version", installed.get)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


@pytest.mark.parametrize(
    ("versions", "name"),
    [
        ({"jax_mps": "0.10.11", "jax": "0.10.1"}, "mps"),
        ({"jax_mps": "0.11.1", "metaljax": "0.11.9", "jax": "0.11.2"}, "mps"),
        ({"metaljax": "0.11.9", "jax": "0.11.2"}, "metal"),
        ({"jax_metal": "0.1.1", "jax": "0.5.0"}, "METAL"),
    ],
    ids=str,
)
def test_a_mac_computes_with_its_plug_in_though_jax_would_not(
    versions: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_mac(monkeypatch, **versions)
    use_platform(None)
    assert jax.config.jax_platforms == f"{name},cpu"
    with pytest.raises(UserError, match="the mesh expert=2 asks for 2 devices and a Mac has one"):
        use_devices(DevicesConfig(), MeshConfig(expert=2))


def test_what_a_person_set_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_platforms
    a_mac(monkeypatch, jax="0.10.1")  # without a plug-in
    use_platform(None)
    a_mac(monkeypatch, jax_mps="0.10.11", jax="0.10.1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    use_platform(None)
    assert jax.config.jax_platforms == before


@pytest.mark.parametrize(
    ("macos", "versions", "sentence"),
    [
        (
            "15.5",
            {"jax": "0.10.1"},
            r"no plug-in for Metal .*: pip install 'moe-jax\[mac",
        ),
        (
            "13.6.1",
            {"jax_mps": "0.10.11", "jax": "0.10.1"},
            "macOS 13.6.1 is too old for jax-mps 0.10.11: update to macOS 14 or later",
        ),
        (
            "15.5",
            {"jax_mps": "0.10.11", "jax": "0.11.2"},
            "jax-mps 0.10.11 is made for jax 0.10 and jax 0.11.2 is installed: pip install",
        ),
        (
            "15.5",
            {"jax_metal": "0.1.1", "jax": "0.10.1"},
            "jax-metal 0.1.1 is made for jax 0.5 and jax 0.10.1 is installed",
        ),
    ],
    ids=["none", "macos", "jax", "jax-metal"],
)
def test_a_mac_that_cannot(
    macos: str, versions: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_mac(monkeypatch, macos, **versions)
    with pytest.raises(UserError, match=sentence):
        use_platform("metal")


def test_not_a_mac() -> None:
    with pytest.raises(UserError, match=r"needs a Mac with Apple .*metal-on-cpu"):
        use_platform("metal")
    with pytest.raises(UserError, match="--platform cuda: JAX has no plug-in for it: pip install"):
        use_platform("cuda")
    with pytest.raises(UserError, match="--platform 'vulkan' is unknown: choose cpu, cuda"):
        check_platform("vulkan")


def test_metal_on_cpu_has_one_device_until_the_next_command() -> None:
    use_platform(metal.METAL_ON_CPU)
    assert default_platform().name == "metal"
    for devices in (lambda: start_devices(MeshConfig(expert=2), None), _simulate(2)):
        with pytest.raises(UserError, match="2 devices and a Mac has one GPU"):
            devices()
    use_platform(None)
    assert default_platform().name == "cpu"


def _simulate(devices: int):
    return lambda: start_devices(MeshConfig(), devices)
