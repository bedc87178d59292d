"""What the Python tests share: the device, and tolerances."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """`large` tests run where the machine has the memory that they name."""
    available = _available_gigabytes()
    for item in items:
        marker = item.get_closest_marker("large")
        if marker is not None and available < marker.kwargs["gigabytes"]:
            reason = f"needs {marker.kwargs['gigabytes']} GB of memory, {available:.0f} available"
            item.add_marker(pytest.mark.skip(reason=reason))


def _available_gigabytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return 0.0
