from __future__ import annotations

import pytest
import torch

from gradclip import ArgumentError, EngineUnavailableError
from gradclip.engines import check_engine_name, engine_for, norm_dtype


@pytest.mark.parametrize("name", ["auto", "operators", "reference"])
def test_the_names_of_engines_that_are_there_are_accepted(name):
    assert check_engine_name(name) == name


@pytest.mark.parametrize("name", ["native", "triton"])
def test_an_engine_that_is_asked_for_and_not_there_is_an_error(name):
    with pytest.raises(EngineUnavailableError, match=f"engine='{name}' is not available"):
        check_engine_name(name)


@pytest.mark.parametrize("name", ["fast", None, 1, ""])
def test_what_names_no_engine_is_refused(name):
    with pytest.raises(ArgumentError, match="names no engine: give 'auto' or one of 'operators'"):
        check_engine_name(name)


def test_only_auto_chooses():
    cpu = torch.device("cpu")
    assert engine_for("auto", cpu).name == "operators"
    assert engine_for("reference", cpu).name == "reference"


def test_norms_are_kept_in_float64_where_the_device_has_it():
    assert norm_dtype(torch.device("cpu")) == torch.float64
    assert norm_dtype(torch.device("cuda")) == torch.float64
    assert norm_dtype(torch.device("mps")) == torch.float32
