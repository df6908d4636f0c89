"""The choice of an engine for a device, and the errors for one that is missing."""

import sys
import types

import pytest
import torch

from gradclip import ArgumentError, EngineUnavailableError, engines
from gradclip.engines import base, check_engine_name, engine_for, norm_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def unloaded(monkeypatch):
    """The choice of engines before Triton was looked for."""
    monkeypatch.setattr(engines, "_ENGINES", {**engines._ENGINES})
    monkeypatch.setattr(engines, "_BEST", {**engines._BEST})
    for chosen, key in ((engines._ENGINES, "triton"), (engines._BEST, "cuda")):
        chosen.pop(key, None)
    engines._load_triton.cache_clear()
    yield
    engines._load_triton.cache_clear()


def test_an_engine_asked_for_by_name_that_is_missing_is_an_error(monkeypatch):
    for name in ("auto", "operators", "reference"):
        assert check_engine_name(name) == name
    monkeypatch.setattr(engines, "_load_native", lambda: "engine='native' is not available: reason")
    with pytest.raises(EngineUnavailableError, match="engine='native' is not available: reason"):
        check_engine_name("native")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, r"not available: import of triton.*Install"),
        (types.SimpleNamespace(__version__="3.1.0+git"), r"Triton 3.1.0\+git is .* 3.2 or newer"),
    ],
    ids=["missing", "too old"],
)
def test_without_triton_torch_operators_serve_cuda(module, reason, monkeypatch):
    """Nothing looks for Triton before a CUDA device or its name asks for it."""
    monkeypatch.setitem(sys.modules, "triton", module)
    assert check_engine_name("auto") == "auto"
    engine_for("auto", CPU)
    assert engines._load_triton.cache_info().currsize == 0
    with pytest.raises(EngineUnavailableError, match=reason):
        check_engine_name("triton")
    assert engine_for("auto", CUDA).name == "operators"


@pytest.mark.usefixtures("unloaded")
def test_triton_serves_cuda_devices_that_it_compiles_for(monkeypatch):
    pytest.importorskip("triton", reason="there is no Triton")
    from gradclip.engines.triton import launching

    monkeypatch.setattr(launching, "_failure", lambda device: None)
    for capability, name in (((9, 0), "triton"), ((7, 0), "triton"), ((6, 1), "operators")):
        monkeypatch.setattr(launching, "_capability", lambda device, found=capability: found)
        assert engine_for("auto", CUDA).name == name
        if name == "triton":
            assert engine_for("triton", CUDA).name == "triton"
        else:
            with pytest.raises(EngineUnavailableError, match="7.0 or newer, and cuda:0 has 6.1"):
                engine_for("triton", CUDA)


@pytest.mark.usefixtures("unloaded")
def test_where_triton_cannot_launch_torch_operators_serve(monkeypatch):
    pytest.importorskip("triton", reason="there is no Triton")
    from gradclip.engines.triton import launching

    def launch(*arguments):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launching, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching.torch, "empty", lambda *shape, **options: None)
    launching._failure.cache_clear()
    check_engine_name("triton")
    with pytest.raises(EngineUnavailableError, match="cuda:0: RuntimeError: Failed to find C com"):
        engine_for("triton", CUDA)
    assert engine_for("auto", CUDA).name == "operators"
    launching._failure.cache_clear()


@pytest.mark.parametrize("name", ["fast", None, 1, "", [], {}])
def test_what_names_no_engine_is_refused(name):
    """Unhashable names as well."""
    for choose in (check_engine_name, lambda name: engine_for(name, CPU)):
        with pytest.raises(
            ArgumentError, match="names no engine: give 'auto' or one of 'operators'"
        ):
            choose(name)


def test_only_auto_chooses(native_engine, monkeypatch):
    assert engine_for("auto", CPU) is native_engine
    for name in ("native", "operators", "reference"):
        assert engine_for(name, CPU).name == name
    for kind in ("xpu", "mps", "hpu", "meta"):
        assert engine_for("auto", torch.device(kind)).name == "operators"
    with pytest.raises(EngineUnavailableError, match="serves the CPU, .* on meta: give engine='au"):
        engine_for("native", torch.device("meta"))
    monkeypatch.setattr(engines, "_BEST", {})
    assert engine_for("auto", CPU).name == "operators"


def test_norms_have_float64_if_the_device_has_it(monkeypatch):
    assert norm_dtype(CPU) == norm_dtype(torch.device("cuda")) == torch.float64
    assert norm_dtype(torch.device("mps")) == torch.float32
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        properties = types.SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, p=properties: p)
        base._has_float64.cache_clear()
        assert norm_dtype(torch.device("xpu", 0)) == dtype
    base._has_float64.cache_clear()
