from __future__ import annotations

import pytest
import torch

from gradclip import ArgumentError, EngineUnavailableError, engines
from gradclip.engines import check_engine_name, engine_for, norm_dtype


@pytest.mark.parametrize("name", ["auto", "operators", "reference"])
def test_the_names_of_engines_that_are_there_are_accepted(name):
    assert check_engine_name(name) == name


def test_an_engine_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    with pytest.raises(EngineUnavailableError, match="engine='triton' is not available"):
        check_engine_name("triton")
    monkeypatch.setattr(engines, "_ENGINES", {})
    monkeypatch.setitem(engines._MISSING, "native", "engine='native' is not available: reason")
    with pytest.raises(EngineUnavailableError, match="engine='native' is not available: reason"):
        check_engine_name("native")


@pytest.mark.parametrize("name", ["fast", None, 1, ""])
def test_what_names_no_engine_is_refused(name):
    with pytest.raises(ArgumentError, match="names no engine: give 'auto' or one of 'operators'"):
        check_engine_name(name)


def test_only_auto_chooses(native_engine):
    cpu = torch.device("cpu")
    assert engine_for("auto", cpu) is native_engine
    assert engine_for("auto", torch.device("meta")).name == "operators"
    for name in ("native", "operators", "reference"):
        assert engine_for(name, cpu).name == name


def test_without_the_native_engine_torch_operators_serve_the_cpu(monkeypatch):
    monkeypatch.setattr(engines, "_BEST", {})
    assert engine_for("auto", torch.device("cpu")).name == "operators"


def test_the_native_engine_asked_for_by_name_serves_no_other_device(native_engine):
    with pytest.raises(EngineUnavailableError, match="serves the CPU, .* on meta: give engine='au"):
        engine_for("native", torch.device("meta"))


def test_norms_are_kept_in_float64_where_the_device_has_it():
    assert norm_dtype(torch.device("cpu")) == torch.float64
    assert norm_dtype(torch.device("cuda")) == torch.float64
    assert norm_dtype(torch.device("mps")) == torch.float32
