import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not (os.environ.get("SELFIMPROVE_GPU") and torch.cuda.is_available()):
        pytest.skip("needs an NVIDIA GPU: make test-gpu")
