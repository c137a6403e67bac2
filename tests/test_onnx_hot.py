"""Experts in a graphics card's memory and on the CPU at a time; ONNX Runtime's CPU provider stands for the card."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
from models import engine_of, golden, run

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import edgert
from edgert import graphics_memory, verifying
from edgert.devices.onnx_hot import HotExperts
from edgert.devices.selection import Selection, parse
from edgert.errors import MemoryLimitError, OptionError
from edgert.graphics_memory import card_bytes, hot_experts

F32_BOUND = 2e-3


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ONNX Runtime computes is on a card with a memory of its own."""
    monkeypatch.setattr(Selection, "on_card", lambda self, part: "onnx:" in getattr(self, part))
    monkeypatch.setattr(graphics_memory, "_free", lambda: 1 << 40)
    monkeypatch.setattr(verifying, "folder", lambda: tmp_path / "verdicts")


@pytest.mark.parametrize("device", ["onnx:cpu", "attention=cpu,experts=onnx:cpu"])
@pytest.mark.parametrize("name", ["olmoe-f32", "qwen2moe-f32"])
def test_experts_in_two_places_give_llama_cpps_logits(name: str, device: str) -> None:
    path, expected = golden(name)
    tokens = expected["tokens"].tolist()
    for n_hot in (0, 3, 8):
        used = np.random.default_rng(n_hot).random((64, 8), np.float32)
        is_hot = hot_experts(n_hot, (64, 8), used)
        engine, session = engine_of(path, device=partial(parse(device).make, kv_type="f32", is_hot=is_hot))
        hidden: list[Any] = []
        engine.observe = lambda layer, made=engine.device, hidden=hidden: hidden.append(made.hidden(layer).copy())
        for chunk in (64, 7):
            session.tokens.clear()
            assert np.abs(run(engine, session, tokens, chunk=chunk) - expected["logits"]).max() <= F32_BOUND
        assert hidden and all(np.isfinite(rows).all() for rows in hidden)
        engine.device.close()


def experts_of(model: edgert.Model) -> Any:
    with model.held() as parts:
        return parts.engine.device._experts  # type: ignore[attr-defined]


def test_as_many_experts_as_fit_lie_on_the_card(card: None, tmp_path: Path) -> None:
    path = tiny_moe.write(tmp_path / "tiny.gguf")
    expected = edgert.load(path, device="cpu", context=64).generate("a b", max_tokens=4, temperature=0).text
    with edgert.load(path, device="onnx:cpu", context=64) as model:
        assert not isinstance(experts_of(model), HotExperts)  # there is room for all
        whole = model.memory
    with pytest.raises(MemoryLimitError, match=r"--gpu-memory 1MiB is below the \d+ MiB that onnx:cpu takes") as error:
        edgert.load(path, device="onnx:cpu", context=64, gpu_memory="1MiB")
    least = int(str(error.value).partition("below the ")[2].partition(" MiB")[0])
    with edgert.load(path, device="onnx:cpu", context=64, gpu_memory=f"{least}MiB") as model:
        made = experts_of(model)
        assert isinstance(made, HotExperts) and 0 < made._hot_ones.sum() < made._hot_ones.size
        assert model.memory.cold > whole.cold == 0  # of the machine's memory
        assert model.generate("a b", max_tokens=4, temperature=0).text == expected


def test_a_size_is_for_devices_that_have_a_card(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"gpu_memory='1GiB': cpu has no memory of its own"):
        edgert.load(device="cpu", gpu_memory="1GiB", context=64)
    for share in ("50%", 0.5):  # of what?
        with pytest.raises(OptionError, match=r"gpu_memory=.* a share would be of the machine's memory"):
            card_bytes(share, parse("cuda"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gpu_memory='much' is not a size"):
        card_bytes("much", parse("cuda"))
    assert card_bytes("1GiB", parse("attention=cuda,experts=cpu")) == 1 << 30
    assert parse("cuda").on_card("experts") and not parse("attention=cuda,experts=cpu").on_card("experts")


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of nvidia-smi: two cards, with 1,000 and 2,000 MiB free."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *"-i 0") echo 1000;; *"-i 1"|*"-i GPU-2") echo 2000;;'
        " *-i*) echo No devices; exit 6;; *) echo 2000; echo 1000;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return program


@pytest.mark.parametrize(
    ("visible", "order", "free"),
    [
        (None, None, 1000),  # CUDA's first may be either
        (None, "PCI_BUS_ID", 1000),
        ("1", "PCI_BUS_ID", 2000),
        ("1,0", "PCI_BUS_ID", 2000),
        ("1", None, 1000),
        ("GPU-2", None, 2000),
    ],
)
def test_free_memory_is_that_of_the_card_that_cuda_takes(
    smi: Path, visible: str | None, order: str | None, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert card_bytes(None, parse("cuda")) == int(0.9 * (free << 20))


def test_a_size_is_asked_for_where_nobody_knows_what_is_free(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics_memory, "provider_of", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3")
    for name in ("cuda", "attention=cpu,experts=cuda"):
        with pytest.raises(OptionError, match=r"nvidia-smi does not say.*--gpu-memory, for example 6GiB"):
            card_bytes(None, parse(name))
    smi.unlink()
    monkeypatch.setenv("PATH", str(smi.parent))
    with pytest.raises(OptionError, match="nvidia-smi does not say"):
        card_bytes(None, parse("cuda"))
    assert card_bytes(None, parse("attention=cuda,experts=cpu")) is None  # takes what it takes
    monkeypatch.setattr(Selection, "on_card", lambda self, part: False)
    assert card_bytes(None, parse("cuda")) is None


def test_a_boards_gpu_shares_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36")
    monkeypatch.setattr("edgert.devices.selection.UNIFIED", release)
    assert not parse("cuda").on_card("attention")


def test_the_most_used_experts_are_hot() -> None:
    used = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.3]], np.float32)
    assert hot_experts(1, (2, 3), used).tolist() == [[False, True, False], [True, False, False]]
    assert hot_experts(2, (2, 3), None).tolist() == [[True, True, False]] * 2
