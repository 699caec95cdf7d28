"""The environment is that of `make test-frameworks`: requirements/frameworks.txt."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Nothing is asked for, or told to, anybody outside.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true", MPLBACKEND="Agg"
)

# timm and fastai import torchvision, whose wheels find their compiled part only beside a torch with CUDA. Nothing here
# uses it, but torchvision does not import where two operators are not declared.
_DECLARED = None
if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
    _DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure(config: pytest.Config) -> None:
    if any("frameworks" in str(each) for each in config.args):  # a run of these, and not of all suites
        config.addinivalue_line("filterwarnings", "default")  # theirs are not ours to mend


@pytest.fixture(autouse=True)
def _one_thread(in_one_thread):
    """Small models, in all of these suites."""
