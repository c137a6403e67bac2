"""Verification of devices: a sound one is trusted for good, a wrong one and one that leaves work are refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import edgert
from edgert import device_speed, doctor, doctor_devices, verifying
from edgert.device_speed import record_speed, speeds_of
from edgert.devices import onnx_attention, onnx_experts, onnx_forms, onnx_placement, onnx_runtime
from edgert.devices.cpu import CpuDevice
from edgert.devices.cpu_parts import CpuExperts
from edgert.devices.onnx_memory import LIBRARY_BYTES
from edgert.devices.onnx_placement import fallen
from edgert.devices.onnx_weights import floats
from edgert.devices.verification import PROMPT_TOKENS, RANDOM_ROWS, Findings
from edgert.errors import DeviceError
from edgert.memory import PROCESS_BYTES
from edgert.quant.formats import F32, Matrix
from edgert.tensor_table import HEAD

PROVIDERS = [provider.name for provider in onnx_runtime.available()]
PROVEN = [provider.name for provider in onnx_runtime.available() if provider.proven]
CPUINFO = Path("/proc/cpuinfo")
HAS_AZURE = "AzureExecutionProvider" in onnx_runtime.runtime().get_available_providers()
HAS_BF16 = CPUINFO.exists() and any(name in CPUINFO.read_text() for name in ("avx512_bf16", "amx_bf16"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of verdicts of the test's own; kernels stay where they are."""
    monkeypatch.setattr(verifying, "folder", lambda: tmp_path / "verdicts")
    monkeypatch.setattr(device_speed, "folder", lambda: tmp_path / "verdicts")
    yield tmp_path / "verdicts"


def load(model: Path, device: str, **options: Any) -> None:
    edgert.load(model, device=device, context=64, **options).close()


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize(
    "device", ["attention=onnx:cpu,experts=cpu", "attention=cpu,experts=onnx:cpu", *(f"onnx:{name}" for name in PROVEN)]
)
def test_a_sound_device_is_trusted_and_not_asked_again(
    model: Path, device: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, device, activations=activations)
    (verdict,) = verifying.verdicts()
    assert verdict.device == device and not verdict.problems and not verdict.fallen
    assert 0 < verdict.product_error < 1e-6
    assert verdict.errors["experts"] < 1e-2 and verdict.divergence < 1e-3
    assert ("head" in verdict.errors) == (not device.startswith("attention=cpu"))
    monkeypatch.setattr(verifying, "compare", None)
    load(model, device, activations=activations)


def test_streamed_experts_are_verified_too(model: Path, tmp_path: Path) -> None:
    bundle = edgert.pack.pack(model, tmp_path / "tiny.edge", progress=lambda stage, fraction: None)
    load(bundle, "onnx:cpu", residency=0.5)
    (verdict,) = verifying.verdicts()
    assert not verdict.problems and verdict.errors["experts"] < 1e-2


def test_the_cpu_has_one_expert_at_a_time_while_it_verifies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(*options: Any) -> None:
        raise AssertionError("kept until the layer is done")

    at_work: list[int] = []
    run = CpuExperts.experts
    monkeypatch.setattr(CpuExperts, "experts", lambda self, group: (at_work.append(len(group.ids)), run(self, group)))
    monkeypatch.setattr(CpuDevice, "pack_expert", packed)
    load(model, "onnx:cpu")
    (verdict,) = verifying.verdicts()
    assert set(at_work) == {1} and not verdict.problems and verdict.errors["experts"] < 1e-2


def test_what_verifying_takes_is_planned_for(model: Path) -> None:
    with edgert.load(model, device="onnx:cpu", context=64) as opened, opened.held() as parts:
        config, planned = parts.engine.config, opened.memory
        head = next(one for one in parts.weights.hot() if one.name == HEAD).matrix
    assert head is not None
    verified = planned.process - PROCESS_BYTES - LIBRARY_BYTES
    assert verified > head.format.matrix_bytes(*head.shape) + (PROMPT_TOKENS + RANDOM_ROWS) * 4 * config.n_vocab
    with edgert.load(model, device="onnx:cpu", context=64) as again:
        assert again.memory.process == planned.process - verified  # the verdict is kept: nothing is to be found out


@pytest.mark.parametrize(
    ("part", "output", "words"),
    [
        (onnx_experts, "out", "experts is off by"),
        (onnx_experts, "total", "experts is off by"),
        (onnx_attention, "normed", "attention is off by"),
        (onnx_attention, "new_x", "attention is off by"),
        (onnx_attention, "weights", "router is off by"),
        (onnx_attention, "new_keys", "attention is off by"),
        (onnx_attention, "logits", "head is off by"),
    ],
)
def test_a_provider_with_wrong_numbers_is_refused_with_the_figure(
    model: Path, part: Any, output: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(onnx_runtime.Call):
        """Nearly right: one output is a tenth too large."""

        def __call__(self, inputs: Any, outputs: Any) -> None:
            super().__call__(inputs, outputs)
            if output in outputs:
                outputs[output].read()[...] *= outputs[output].buffer.dtype.type(1.1)

    monkeypatch.setattr(part, "Call", Wrong)
    if part is onnx_experts:
        monkeypatch.setattr(onnx_forms, "Call", Wrong)
    with pytest.raises(DeviceError, match=f"not to be trusted.*{words}.*onnx:cpu! to use it"):
        load(model, "onnx:cpu")
    with pytest.raises(DeviceError, match=words):  # the verdict is kept
        load(model, "onnx:cpu")
    load(model, "onnx:cpu!")


@pytest.mark.parametrize(
    ("part", "scale", "words"),
    [
        ("value", 1.04, "attention is [34].* % too large"),
        ("output", 0.96, "attention is [34].* % too small"),
        ("down", 1.02, "experts is [12].* % too large"),
        ("gate", 0.97, "experts is [23].* % too small"),
        ("head", 1.02, "head is [12].* % too large"),
    ],
)
def test_a_scale_that_is_a_little_off_in_a_single_layer_is_found(
    model: Path, part: str, scale: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(source: Any) -> Matrix:
        return Matrix(F32, floats(source) * np.float32(scale))

    attention, experts = onnx_attention.OnnxAttention, onnx_experts.OnnxExperts
    add_layer, set_head, pack_expert = attention.add_layer, attention.set_head, experts.pack_expert

    def second(self: Any, weights: Any) -> None:
        if len(self._calls) == 1 and part in ("value", "output"):
            linear = getattr(weights.mixer, part)
            linear = replace(linear, matrix=scaled(linear.matrix))
            weights = replace(weights, mixer=replace(weights.mixer, **{part: linear}))
        add_layer(self, weights)

    def expert_of_the_second(self: Any, weights: Any) -> Any:
        if self.layer == 1 and hasattr(weights, part):
            weights = replace(weights, **{part: scaled(getattr(weights, part))})
        return pack_expert(self, weights)

    def head(self: Any, norm: Any, output: Any) -> None:
        set_head(self, norm, replace(output, matrix=scaled(output.matrix)) if part == "head" else output)

    monkeypatch.setattr(attention, "add_layer", second)
    monkeypatch.setattr(attention, "set_head", head)
    monkeypatch.setattr(experts, "pack_expert", expert_of_the_second)
    with pytest.raises(DeviceError, match=f"not to be trusted.*{words}"):
        load(model, "onnx:cpu")


def test_the_prompt_is_long_enough_for_a_mean_and_may_be_cut_by_the_context(model: Path) -> None:
    with edgert.load() as embedded, embedded.held() as parts:
        assert len(parts.tokenizer.encode(verifying.PROMPT)) > 1.2 * PROMPT_TOKENS
    edgert.load(model, device="onnx:cpu", context=3).close()
    (verdict,) = verifying.verdicts()
    assert not verdict.problems


@pytest.mark.skipif(not HAS_AZURE, reason="this onnxruntime has no provider that takes nothing")
def test_a_provider_that_leaves_its_work_to_the_cpu_is_refused_by_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "_REMOTE", ())
    with pytest.raises(DeviceError, match=r"leaves nodes to another provider: \d+ of .*and \d+ other kinds") as told:
        load(model, "onnx:azure")
    (verdict,) = verifying.verdicts()
    assert "MatMul on CPUExecutionProvider" in verdict.fallen and str(told.value).count("CPUExecutionProvider") == 3
    assert not any("off by" in problem for problem in verdict.problems)  # the numbers are the CPU's
    load(model, "onnx:azure!")


def test_a_provider_that_cannot_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = onnx_runtime.Provider("absent", "CUDAExecutionProvider")
    monkeypatch.setattr(onnx_runtime, "available", lambda: [absent])
    graph = next(iter(_one_graph()))
    with pytest.warns(UserWarning, match="not in available"):
        with pytest.raises(DeviceError, match="absent could not be started, CPUExecutionProvider took its place"):
            onnx_runtime.session(onnx_runtime.Model(graph), onnx_runtime.settings_for("absent", 1, "f32"))


def _one_graph() -> set[bytes]:
    from edgert.devices.onnx_builder import Graph

    g = Graph(exact=True)
    x = g.input("x", np.float32, "n", 4)
    g.output(g.op("Add", x, x, name="y"), np.float32, "n", 4)
    return {g.model().graph}


def test_a_provider_that_rounds_floats_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Coarse:
        """A session whose outputs have the 8 bits of bf16."""

        def __init__(self, made: Any) -> None:
            self._made = made

        def run(self, names: Any, inputs: Any) -> list[Any]:
            found = self._made.run(names, inputs)
            return [(rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for rows in found]

    monkeypatch.setattr(verifying, "_fallen", lambda settings: {})
    monkeypatch.setattr(onnx_placement, "session", lambda *options: Coarse(onnx_runtime.session(*options)))
    with pytest.raises(DeviceError, match=r"products of float32 are off by 0\.00\d: it computes in fewer bits"):
        load(model, "onnx:cpu")


@pytest.mark.skipif("openvino" not in PROVIDERS, reason="onnxruntime-openvino is not installed")
def test_openvino_heeds_the_precision_that_it_is_told() -> None:
    settings = onnx_runtime.settings_for("openvino", 2, "int8")
    assert onnx_placement.product_error(settings) < 1e-6


@pytest.mark.skipif("openvino" not in PROVIDERS, reason="onnxruntime-openvino is not installed")
@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 that OpenVINO could compute in")
def test_openvino_is_seen_to_compute_in_bf16_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"device_type": "CPU", "load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}})}
    monkeypatch.setattr(onnx_runtime.Settings, "provider_options", lambda self: told)
    assert onnx_placement.product_error(onnx_runtime.settings_for("openvino", 2, "int8")) > 1e-4


def test_what_runs_where_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "_REMOTE", ())
    graphs = _one_graph()
    assert not fallen(graphs, onnx_runtime.settings_for("cpu", 1, "f32"))
    if HAS_AZURE:
        settings = onnx_runtime.settings_for("azure", 1, "f32")
        assert fallen(graphs, settings) == {"Add on CPUExecutionProvider": 1}


def test_problems_are_what_is_beyond_its_bound() -> None:
    sound = Findings({"attention": 1e-4, "experts": 2e-4}, {"attention": -1e-5}, 1e-6, 0.0)
    assert sound.problems("f32") == [] == sound.problems("int8")
    wrong = Findings({"attention": 0.3, "experts": float("inf")}, {"experts": float("inf")}, float("inf"), 0.5)
    assert len(wrong.problems("int8")) == 5
    assert Findings({"experts": 0.02}, {"experts": 0.005}, 1e-3, 0.0).problems("int8") == []
    assert "experts is off by 2 % (at most 0.1 %)" in Findings({"experts": 0.02}, {}, 1e-6, 0.0).problems("f32")
    assert Findings({}, {"head": -0.03}, 0.0, 0.0).problems("int8") == ["head is 3 % too small (at most 1 %)"]
    assert len(Findings({}, {}, 6e-3, 0.0).problems("int8")) == 1


def test_damaged_verdicts_count_as_none(kept: Path, model: Path) -> None:
    load(model, "onnx:cpu")
    (path,) = kept.glob("*.json")
    for damage in ("", "[]", json.dumps({"device": "onnx:cpu"})):
        path.write_text(damage)
        assert list(verifying.verdicts()) == []
        load(model, "onnx:cpu")
        assert len(list(verifying.verdicts())) == 1


# ---- which device is taken -------------------------------------------------------------------------------------------
def device_of(model: Path, **options: Any) -> str:
    with edgert.load(model, context=64, **options) as opened, opened.held() as parts:
        return parts.engine.device.name


def test_auto_takes_what_was_measured_to_be_faster_while_it_is_trusted(model: Path, kept: Path) -> None:
    assert device_of(model) == "cpu"
    record_speed(model, "onnx:cpu", 50.0)
    assert device_of(model) == "cpu"  # not measured itself
    record_speed(model, "cpu", 30.0)
    assert device_of(model) == "cpu"  # the other is not verified
    load(model, "onnx:cpu")
    assert device_of(model) == "onnx:cpu"
    findings = [finding for finding in doctor.findings() if finding.area == "devices"]
    assert ("onnx:cpu", "verified") in [(finding.name, finding.value) for finding in findings]
    (auto,) = (finding for finding in findings if finding.name == "auto")
    assert auto.value == "onnx:cpu" and "onnx:cpu 50 tok/s, cpu 30 tok/s" in auto.reason
    record_speed(model, "cpu", 60.0)
    assert device_of(model) == "cpu"


@pytest.fixture
def faster(model: Path, kept: Path) -> None:
    """Another device is trusted, and was measured to be faster."""
    load(model, "onnx:cpu")
    record_speed(model, "cpu", 30.0)
    record_speed(model, "onnx:cpu", 50.0)


def test_auto_takes_the_cpu_where_the_other_is_no_longer_there(
    model: Path, faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_of(model) == "onnx:cpu"
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert device_of(model) == "cpu"


def test_auto_takes_the_cpu_where_the_other_cannot_do_what_is_asked(model: Path, faster: None) -> None:
    assert device_of(model, kv_type="f32") == "onnx:cpu"
    assert device_of(model, kv_type="int8") == "cpu"
    assert device_of(model, residency=0.5) == "cpu"  # its speed was another's


def test_the_last_verdict_of_a_day_counts(model: Path, faster: None, kept: Path) -> None:
    (path,) = kept.glob("*.json")
    document = json.loads(path.read_text())
    (kept / "0.json").write_text(json.dumps(document | {"problems": ["experts is off by 30 %"]}))
    os.utime(kept / "0.json", ns=(0, path.stat().st_mtime_ns + 1))
    assert device_of(model) == "cpu"
    os.utime(kept / "0.json", ns=(0, path.stat().st_mtime_ns - 1))
    assert device_of(model) == "onnx:cpu"
    devices = [finding for finding in doctor.findings() if finding.name == "onnx:cpu"]
    assert [finding.value for finding in devices] == ["verified"]  # the older one is passed over


def test_a_verdict_on_what_is_installed_no_longer_is_no_trust(model: Path, faster: None, kept: Path) -> None:
    (path,) = kept.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime": "onnxruntime 1.17"}))
    (finding,) = (finding for finding in doctor.findings() if finding.name == "onnx:cpu")
    assert finding.value == "unverified" and "verified before it or its driver changed" in finding.reason
    assert device_of(model) == "cpu"


def test_a_graph_that_is_not_taken_is_told_as_that(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: Any) -> None:
        raise DeviceError("onnx:cpu does not take a graph of this model")

    monkeypatch.setattr(onnx_attention, "session", refused)
    with pytest.raises(DeviceError, match="does not take a graph"):
        load(model, "onnx:cpu")


def test_doctor_says_what_was_refused_and_what_nobody_has_tried(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "PROVIDERS", onnx_runtime.PROVIDERS | {"tpu": onnx_runtime.Provider("tpu", "X")})
    monkeypatch.setattr(onnx_runtime.runtime(), "get_available_providers", lambda: ["X", "CPUExecutionProvider"])
    (tpu,) = (finding for finding in doctor.findings() if finding.name == "onnx:tpu")
    assert tpu.value == "unverified" and "tests have not run on it" in tpu.reason


def test_a_service_on_the_network_is_no_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = ["AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_runtime.runtime(), "get_available_providers", lambda: reported)
    assert [provider.name for provider in onnx_runtime.available()] == ["cpu"]
    assert not any("azure" in finding.name for finding in doctor.findings())
    with pytest.raises(DeviceError, match="onnx:azure is not there"):
        load(model, "onnx:azure")


def test_doctor_tells_openvinos_units_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_runtime.runtime(), "get_available_providers", lambda: reported)
    monkeypatch.setattr(onnx_runtime, "_openvino_units", lambda: ["CPU", "GPU.1"])
    verdict = verifying.Verdict("onnx:openvino", "r", "", "m", "p", "d", {}, 0.0, {}, 0.0, ())
    monkeypatch.setattr(doctor_devices, "verdicts", lambda: iter([verdict]))
    monkeypatch.setattr(doctor_devices, "is_present", lambda verdict: True)
    found = {finding.name: finding for finding in doctor.findings() if finding.area == "devices"}
    assert found["onnx:openvino"].value == "verified"
    assert found["onnx:openvino:GPU.1"].value == "unverified" and "not run on it" in found["onnx:openvino:GPU.1"].reason


def test_damaged_speeds_count_as_none(model: Path, kept: Path) -> None:
    record_speed(model, "cpu", 30.0)
    (path,) = (kept.parent / "speeds").glob("*.json")
    slow = '{"model": ["m", 1, 2], "devices": {"cpu": {"tok_s": -1, "with": "x"}}}'
    for damage in ("", "[]", '{"model": [], "devices": {}}', '{"model": [], "devices": {"cpu": -1}}', slow):
        path.write_text(damage)
        assert speeds_of(model) is None
    record_speed(model, "cpu", 20.0)
    found = speeds_of(model)
    assert found is not None and found.devices == {"cpu": 20.0}


def test_a_speed_counts_for_what_it_was_measured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe.write(tmp_path / "m.gguf")
    record_speed(model, "cpu", 30.0, threads=1)
    record_speed(model, "onnx:cpu", 50.0, threads=1)
    one = speeds_of(model, 1)
    assert one is not None and one.fastest == "onnx:cpu" and speeds_of(model, 2) is None
    with monkeypatch.context() as other:
        other.setattr(verifying, "runtime_version", lambda: "onnxruntime 1.17")
        old = speeds_of(model, 1)
        assert old is not None and old.devices == {"cpu": 30.0}  # the other's is of another version
        other.setattr(verifying.jit, "source_stamp", lambda: "another edgert")
        assert speeds_of(model, 1) is None and list(device_speed.all_speeds()) == []
    assert speeds_of(model, 1) == one and list(device_speed.all_speeds()) == [one]
    tiny_moe.write(model, seed=6)
    assert speeds_of(model, 1) is None and list(device_speed.all_speeds()) == []  # another file at the same place
    model.unlink()
    assert speeds_of(model, 1) is None
