"""Names of devices that ONNX Runtime drives: what they stand for, and what is refused, with what is there instead."""

from __future__ import annotations

import json
import sys

import pytest
from models import golden_path

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from test_onnx import PROVIDERS

import edgert
from edgert.devices import onnx_runtime
from edgert.devices.selection import parse
from edgert.errors import DeviceError, OptionError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("attention=cpu", "name both parts"),
        ("attention=cpu,attention=cpu", "name both parts"),
        ("attention=cpu,experts=reference", "no parts"),
        ("onnx:", "not known"),
        ("gpu", "not known"),
        ("experts=onnx:cpu,attention=tpu", "not known"),
    ],
)
def test_names_that_are_none_are_refused(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(name)


def test_names_of_devices() -> None:
    assert parse("cuda") == parse("onnx:cuda") and parse("cuda").onnx
    assert not parse("cpu").onnx and parse("attention=cuda, experts=cpu").compiled


def test_openvinos_units_have_names() -> None:
    assert parse("openvino:gpu.1").name == "onnx:openvino:GPU.1" and parse("onnx:openvino:cpu") == parse("openvino")
    assert parse("attention=openvino:NPU,experts=cpu").attention == "onnx:openvino:NPU"
    assert parse("openvino:NPU+qdq").quantised and not parse("openvino:GPU").quantised
    assert onnx_runtime.form_of("onnx:openvino:NPU") == "static" and onnx_runtime.form_of("openvino:GPU") == ""
    for wrong in ("openvino:AUTO", "openvino:", "cuda:1", "onnx:qnn:GPU", "openvino:GPU.x"):
        with pytest.raises(OptionError, match="no provider with a unit"):
            parse(wrong)


def test_openvino_is_told_its_unit() -> None:
    gpu = onnx_runtime.Settings(onnx_runtime._of_openvino("GPU.1"), threads=2, exact=True)
    assert gpu.name == "onnx:openvino:GPU.1" and not gpu.provider.proven and not gpu.static
    told = gpu.provider_options()
    assert told["device_type"] == "GPU.1" and "num_of_threads" not in told
    assert json.loads(told["load_config"])["GPU.1"]["INFERENCE_PRECISION_HINT"] == "f32"
    npu = onnx_runtime.Settings(onnx_runtime._of_openvino("NPU"))
    assert npu.name == "onnx:openvino:NPU" and npu.static


def test_a_unit_stands_for_its_first_and_is_tried_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_runtime.runtime(), "get_available_providers", lambda: reported)
    for units in (["CPU", "GPU.0", "GPU.1"], []):
        monkeypatch.setattr(onnx_runtime, "_openvino_units", lambda units=units: units)
        assert onnx_runtime.provider_of("openvino:GPU").unit == "GPU"
        assert onnx_runtime.provider_of("openvino:GPU.1+static").form == "static"
    monkeypatch.setattr(onnx_runtime, "_openvino_units", lambda: ["CPU"])
    with pytest.raises(DeviceError, match="is not there"):
        onnx_runtime.provider_of("openvino:GPU")


@pytest.mark.skipif("openvino" not in PROVIDERS, reason="onnxruntime-openvino is not installed")
def test_a_unit_of_openvino_that_is_not_there_is_refused_with_those_that_are() -> None:
    if "GPU" in onnx_runtime._openvino_units():
        pytest.skip("this machine has one")
    with pytest.raises(DeviceError, match=r"onnx:openvino:GPU is not there.*onnx:openvino"):
        edgert.load(golden_path("olmoe-q4_0"), device="openvino:GPU")


def test_a_provider_that_is_not_installed_is_refused_with_those_that_are() -> None:
    with pytest.raises(DeviceError, match=r"onnx:tensorrt is not there.*onnx:cpu"):
        edgert.load(golden_path("olmoe-q4_0"), device="tensorrt")


def test_a_type_of_cache_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match=r"int8.*f16 or f32"):
        edgert.load(device="onnx:cpu", kv_type="int8", context=64)


def test_a_graph_that_the_provider_does_not_take_is_refused() -> None:
    settings = onnx_runtime.settings_for("cpu", 1, "f32")
    with pytest.raises(DeviceError, match="onnx:cpu does not take"):
        onnx_runtime.session(onnx_runtime.Model(b"no graph"), settings)


def test_without_the_packages_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"pip install 'edgert\[onnx\]'"):
        onnx_runtime.available()
