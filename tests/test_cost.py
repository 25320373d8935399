"""The cost of a block of code, compared with work of known cost."""

import math
import time
from pathlib import Path

import pytest
import torch

from sae_lens_multilayer.sweeps import cost as cost_module
from sae_lens_multilayer.sweeps.cost import measured

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak"
)


@needs_linux
def test_the_peak_is_of_the_block_and_not_of_earlier_work():
    with measured() as first:
        torch.ones(64 * 2**18)  # 64 MiB, given back at once
    with measured() as second:
        pass

    # Some of its pages may have been there.
    assert 60 <= first.peak_memory_mib - first.memory_before_mib < 100
    assert second.peak_memory_mib < first.peak_memory_mib - 50


def test_time_asleep_is_no_cpu_time():
    with measured() as cost:
        time.sleep(0.2)

    assert cost.seconds >= 0.2
    assert 0 <= cost.cpu_seconds < 0.2


def test_work_that_fails_is_measured_too():
    with pytest.raises(ValueError, match="oh"), measured() as cost:
        raise ValueError("oh")

    assert cost.seconds >= 0


def test_unavailable_measurements_are_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_module, "_PROCESS", tmp_path / "nowhere")
    with measured() as cost:
        pass

    assert math.isnan(cost.memory_before_mib)
    assert math.isnan(cost.peak_memory_mib)
    assert cost.seconds >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_that_of_the_block():
    held = torch.ones(2**18, device="cuda")
    with measured() as cost:
        torch.ones(64 * 2**18, device="cuda")

    assert (
        65 <= cost.peak_device_memory_mib < 70 + torch.cuda.memory_allocated() / 2**20
    )
    del held
