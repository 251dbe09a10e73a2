"""What a platform is assumed to do: the CPU of the tests, kinds of accelerators, unknown ones."""

from __future__ import annotations

import types

import jax
import pytest

from moe_jax.runtime.metal import METAL_ON_CPU, PLUGINS
from moe_jax.runtime.platform import (
    PLATFORMS,
    default_platform,
    host_device,
    platform_of,
    standing_in,
)


def device(platform: str, kind: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform=platform, device_kind=kind)


def test_the_cpu_is_one_record_whatever_its_kind() -> None:
    assert platform_of(jax.devices()[0]) is default_platform() is PLATFORMS["cpu"]
    assert platform_of(device("cpu", "NVIDIA H100")) is PLATFORMS["cpu"]
    assert (default_platform().flops, default_platform().link_within) == (3e10, 4e9)
    assert host_device().platform == "cpu"


@pytest.mark.parametrize(
    ("platform", "kind", "rates"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", (9.89e14, 4.5e11, 4e11)),
        ("gpu", "NVIDIA H100 PCIe", (7.56e14, 6.4e10, 4e11)),
        ("gpu", "NVIDIA H200", (9.89e14, 4.5e11, 4e11)),
        ("cuda", "NVIDIA A100-SXM4-80GB", (3.12e14, 3e11, 2e11)),
        ("gpu", "NVIDIA A100-PCIE-40GB", (3.12e14, 3.2e10, 2e11)),
        ("gpu", "NVIDIA B200", (2.25e15, 9e11, 4e11)),
        ("gpu", "NVIDIA L4", (1.21e14, 3.2e10, 1.25e10)),
        ("gpu", "Tesla T4", (6.5e13, 1.6e10, 1.25e10)),
        ("tpu", "TPU v4", (2.75e14, 3e11, 1.2e12)),
        ("tpu", "TPU v5 lite", (1.97e14, 2e11, 1.6e12)),
        ("tpu", "TPU v5", (4.59e14, 6e11, 2.4e12)),
        ("tpu", "TPU v5p", (4.59e14, 6e11, 2.4e12)),
        ("tpu", "TPU v6e", (9.18e14, 4e11, 1.6e12)),
    ],
    ids=str,
)
def test_a_listed_kind_has_its_own_rates(platform: str, kind: str, rates: tuple) -> None:
    record = platform_of(device(platform, kind))
    assert (record.flops, record.link_within, record.link_between) == rates
    assert (record.donates, record.dtype) == (True, "bfloat16")


@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        ("gpu", "NVIDIA L40S"),
        ("gpu", "AMD Instinct MI300X"),
        ("tpu", "TPU v4 lite"),
        ("tpu", "TPU7x"),
    ],
)
def test_an_unlisted_kind_is_its_platform(platform: str, kind: str) -> None:
    assert platform_of(device(platform, kind)) is PLATFORMS[platform]


def test_an_unknown_platform_is_relied_on_for_nothing() -> None:
    record = platform_of(device("vulkan", "Adreno 750"))
    assert record.name == "vulkan" and not record.simulated
    assert not (record.donates or record.ragged_dot or record.fused_attention or record.reads_host)
    assert record.flops == PLATFORMS["gpu"].flops


@pytest.mark.parametrize("name", PLUGINS)
def test_every_plug_in_for_metal_has_the_record_of_the_weakest(name: str) -> None:
    record = platform_of(device(name, "Apple M4 Max"))
    assert record.name == "metal" and record.one_device and record.dtype == "bfloat16"
    assert not (record.donates or record.open_loops or record.mixed_dots or record.ragged_dot)


def test_the_cpu_stands_in_for_metal_and_is_itself_again() -> None:
    with standing_in(METAL_ON_CPU):
        record = platform_of(jax.devices()[0])
        assert record is default_platform() and record.simulated and record.dtype == "float32"
        assert record.name == "metal" and not (record.donates or record.open_loops)
    assert default_platform() is PLATFORMS["cpu"]
