"""The keywords that every optimizer takes beside its twin's: read, and documented."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from typing import Any

import torch

from . import backends
from .hyperparameters import check_group, read_old_name
from .penalties import MODE_DOCS, OPTIONS, PENALTY_MODE, as_python
from .rules.spec import RuleSpec

# The keywords that are no group options.
OF_THE_OPTIMIZER = ("backend", "norm_group")

BACKEND_DOC = """``"auto"``, or the name of a backend that must be used: ``"cpp"``, ``"cuda"``, ``"triton"``,
``"reference"``. One for the whole optimizer."""

NORM_GROUP_DOC = """the ranks whose optimizers hold different parameters of one model, where these are not DTensors
(ZeRO, pipeline stages, FSDP1): ``max_grad_norm`` is then over all of them. See docs/distributed.md."""

DOC = """\
{title} with L1, L2 and gradient clipping fused into its one update pass.

{kinship} Sparse gradients are refused.

{above}by keyword, per group unless said otherwise:

Keyword Args:
{options}

Raises:
    ValueError: a strength, mode, clip or backend name that is not allowed; groups that disagree on
        ``max_grad_norm``; ``l1 > 0`` on complex parameters. From ``step()``: a gradient on another device, of
        another dtype or shape than its parameter, a parameter that overlaps itself in memory.
    TypeError: a keyword that neither the twin nor fusedreg knows.
    RuntimeError: a backend asked for by name that cannot run. From ``step()``: a sparse gradient.

Whatever raises, no parameter, state or step count has changed.

{rest}
"""

TWIN = """\
A drop-in subclass: the same arguments in the same order, the same state dict; with every regularizer off, the same
step. {inert} are accepted and kept, and change nothing."""


def read_keywords(cls: Any, keywords: dict[str, Any]) -> tuple[dict[str, Any], str, Any]:
    """The options, with defaults for those that are not given, the name of the backend, and the norm's group.

    Raises:
        TypeError: a keyword that nobody knows; the message names the nearest one that there is. A group that is none.
        ValueError, RuntimeError: a value that is not allowed, a backend that cannot run here.
    """
    keywords = dict(keywords)
    read_old_name(keywords)
    backend, norm_group = keywords.pop("backend", "auto"), keywords.pop("norm_group", None)
    defaults = {option.name: option.default for option in OPTIONS} | {"penalty_mode": cls.spec.modes[0]}
    for name in keywords:
        if name not in defaults:
            known = [*defaults, *OF_THE_OPTIMIZER, *inspect.signature(cls).parameters]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean {nearest[0]!r}?"
                if nearest
                else f"; it knows {', '.join((*defaults, *OF_THE_OPTIMIZER))}"
            )
            raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}{hint}")
    backends.check_name(backend)
    if norm_group is not None and not isinstance(norm_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"Invalid norm_group: a {type(norm_group).__name__} (allowed: None, a ProcessGroup of this rank)"
        )
    options = {name: as_python(value) for name, value in {**defaults, **keywords}.items()}
    check_group(cls.spec, options)
    return options, backend, norm_group


def write_docs(name: str, spec: RuleSpec, rest: str | None) -> str:
    """A class's docstring: what all say, and behind it what only this one has to say."""
    modes = [f'``"{mode}"``{" (default)" if mode == spec.modes[0] else ""}: {MODE_DOCS[mode]}' for mode in spec.modes]
    if spec.why_not_others:
        modes.append(f"There are no others: {spec.why_not_others}.")
    docs = {option: option.doc for option in (*spec.options, *OPTIONS)}
    docs[PENALTY_MODE] = " ".join((PENALTY_MODE.doc, *modes))
    options = [(option.name, option.type, doc) for option, doc in docs.items()]
    options += [("backend", "str", BACKEND_DOC), ("norm_group", "ProcessGroup, optional", NORM_GROUP_DOC)]
    lines = [f"{name} ({kind}): {' '.join(doc.split())}" for name, kind, doc in options]
    twin = spec.twin
    if twin is not None:
        inert = [key for key in ("foreach", "fused") if key in inspect.signature(twin).parameters]
        kinship = TWIN.format(inert=" and ".join(f"`{key}`" for key in inert) or "Other implementation flags")
    text = DOC.format(
        title=f"torch.optim.{twin.__name__}" if twin else name.removeprefix("FusedReg"),
        kinship=kinship if twin else "torch.optim has no such optimizer.",
        above="On top of the twin's arguments, " if twin else "All arguments but ``params``, which may be given ",
        options="\n".join(
            textwrap.fill(line, 112, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines
        ),
        rest=inspect.cleandoc(rest or ""),
    )
    return text.rstrip() + "\n"
