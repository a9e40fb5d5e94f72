"""The tests of a GPU on a CPU that stands for it: without the kernels for CPUs, and with bitsandbytes' function for
CUDA. Its own kernels give the expected results."""

import pytest
import torch

from tests.test_gpu import *  # noqa: F403

pytestmark: list[pytest.MarkDecorator] = []  # not those of the other module


@pytest.fixture
def device(cpu_as_gpu: torch.device) -> torch.device:
    return cpu_as_gpu
