import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.train.spikes import LEAST_SEEN, SpikeConfig, judged, no_norms


def spikes(values, limit=6.0):
    norms, found = no_norms(), []
    for number, value in enumerate(values):
        spike, norms = judged(norms, np.float32(value), np.isfinite(value), limit)
        found += [number] if spike else []
    return found


def test_only_what_is_far_above_all_before_is_a_spike():
    usual = np.random.default_rng(0).normal(2.0, 0.1, 60)
    assert spikes(usual) == []
    usual[40] = 5.0
    assert spikes(usual) == [40]
    usual[40] = np.nan
    assert spikes(usual) == []
    usual[40] = 0.01
    assert spikes(usual) == []


def test_the_first_norms_are_no_spikes():
    assert spikes([1.0] * (LEAST_SEEN - 1) + [100.0]) == []
    assert spikes([1.0] * LEAST_SEEN + [100.0]) == [LEAST_SEEN]


def test_norms_that_stay_large_are_got_used_to():
    found = spikes([1.0] * 30 + [3.0] * 200)
    assert found[0] == 30 and len(found) < 100 and found[-1] < 130


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_limit_is_positive(wrong):
    with pytest.raises(ConfigError, match="skip_spikes"):
        SpikeConfig(skip_spikes=wrong)
