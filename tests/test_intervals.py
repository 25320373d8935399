"""Authority: numpy's mean and quantiles over resampled units, drawn by hand."""

import numpy as np
import pytest

from sae_lens_multilayer.studies.intervals import interval, ratio_intervals


def test_ratios_and_their_intervals_equal_resampling_by_hand():
    rng = np.random.default_rng(1)
    numerator, denominator = rng.random(20), 1 + rng.random(20)
    numerator[3] = np.nan  # nothing measured at this unit
    row = ratio_intervals({"ratio": (numerator, denominator)}).loc["ratio"]
    kept = np.arange(20) != 3
    assert row.value == pytest.approx(numerator[kept].sum() / denominator[kept].sum())
    drawn = np.random.default_rng(0).integers(0, 20, (1000, 20))
    resampled = [
        numerator[d[kept[d]]].sum() / denominator[d[kept[d]]].sum() for d in drawn
    ]
    assert (row.low, row.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]))


def test_nothing_measured_gives_nan():
    row = ratio_intervals({"ratio": (np.full(3, np.nan), np.ones(3))}).loc["ratio"]
    assert row.isna().all()
    assert np.isnan(interval([np.nan])).all()
