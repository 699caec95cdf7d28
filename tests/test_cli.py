"""python -m fusedreg."""

from __future__ import annotations

import pytest
import torch

from fusedreg import __main__ as cli
from fusedreg import __version__, parity


def test_info(capsys) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for words in (__version__, torch.__version__, "cpp", "reference", "cuda", "triton"):
        assert words in printed


def test_parity_prints_a_table_and_fails_when_out_of_tolerance(capsys, monkeypatch) -> None:
    few = [case for case in parity.cases("reference") if case.dtype == torch.float32][::7]
    monkeypatch.setattr(parity, "cases", lambda *_: iter(few))
    assert cli.main(["parity"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setitem(parity.TOLERANCE_IN_EPS, torch.float32, 1e-9)
    assert cli.main(["parity"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_no_command_is_an_error() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
