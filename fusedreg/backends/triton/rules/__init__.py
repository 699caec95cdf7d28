"""Stage 5 of a step: the rules, a file each. Adding one is its file here and its name in the list below."""

from __future__ import annotations

import importlib

from .rule import Rule

__all__ = ["RULES", "Rule"]

# The modules of this package that have a RULE.
_NAMES = (
    "adam",
    "sgd",
    "rmsprop",
    "adagrad",
    "nadam",
    "radam",
    "adamax",
    "adadelta",
    "lion",
    "asgd",
    "rprop",
    "ftrl",
)

RULES: dict[str, Rule] = {name: importlib.import_module(f"{__name__}.{name}").RULE for name in _NAMES}
