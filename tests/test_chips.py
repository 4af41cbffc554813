"""Chips: which one JAX's devices are, and what they come to together."""

from types import SimpleNamespace

import jax
import pytest

from jaxpost.chips import CHIPS, KINDS, peak_flops


def devices(kind, places):
    return [SimpleNamespace(device_kind=kind, process_index=p, coords=c) for p, c in places]


def test_every_kind_is_a_chip():
    assert set(KINDS.values()) == set(CHIPS)


def test_a_chip_of_two_devices_counts_once():
    two = devices("TPU7x", [(0, (0, 0, 0)), (0, (0, 0, 0)), (1, (0, 0, 0)), (1, (0, 0, 0))])
    assert peak_flops(two) == 2 * CHIPS["tpu7x"].flops
    assert peak_flops(devices("TPU v5 lite", [(0, (0, 0, 0)), (0, (1, 0, 0))])) == 2 * CHIPS["v5e"].flops


def test_gpus_are_counted():
    assert peak_flops([SimpleNamespace(device_kind="NVIDIA H200")] * 8) == 8 * CHIPS["h200"].flops


def test_nothing_is_said_of_devices_that_are_not_known_or_differ():
    assert peak_flops(jax.devices("cpu")) is None
    assert peak_flops([]) is None
    mixed = [SimpleNamespace(device_kind="NVIDIA H200"), SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")]
    assert peak_flops(mixed) is None


@pytest.mark.parametrize("kind", ["", "NVIDIA H100 PCIe"])  # the latter is slower than the one that is listed
def test_a_kind_is_not_guessed(kind):
    assert peak_flops([SimpleNamespace(device_kind=kind)]) is None
