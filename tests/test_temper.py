"""The tool that gives a model the temperature of a text: what it fits, and that it changes nothing else."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import golden_path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools")]  # it is no package
import temper  # noqa: E402

import edgert  # noqa: E402
from edgert.errors import OptionError  # noqa: E402
from edgert.loading import resolve  # noqa: E402


@settings(deadline=None, max_examples=20)
@given(st.floats(0.6, 1.6), st.integers(0, 2**16))
def test_the_temperature_that_made_a_text_is_found(temperature: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0.0, 2.0, (4000, 12)).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / temperature)
    tokens = (p.cumsum(axis=1) / p.sum(axis=1, keepdims=True) > random.random((4000, 1))).argmax(axis=1)
    found, plain, tempered = temper.fitted(zip(logits, tokens.tolist(), strict=True))
    assert abs(math.log(found / temperature)) < 0.12
    assert tempered <= plain * (1 + 1e-6)


def test_a_text_that_no_temperature_suits_is_refused() -> None:
    logits = np.array([[9.0, 0.0]], np.float32)
    with pytest.raises(OptionError, match="temperature"):
        temper.fitted([(logits[0], 0)] * 5)  # always right: the colder the better
    with pytest.raises(OptionError, match="temperature"):
        temper.fitted([])


def test_only_the_last_norm_changes(tmp_path: Path) -> None:
    source, out = golden_path("olmoe-f32"), tmp_path / "out.gguf"
    temper.fold(source, 1.25, out)
    before, after = (gguf.GGUFReader(path).tensors for path in (source, out))
    for one, other in zip(before, after, strict=True):
        if one.name == "output_norm.weight":
            assert (other.data == one.data / np.float32(1.25)).all()
        else:
            assert one.name == other.name and (one.data == other.data).all()
    assert list(tmp_path.iterdir()) == [out]


def test_the_embedded_model_is_given_the_temperature_of_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    license = str(Path(edgert.__file__).parent / "LICENSE")
    assert (
        temper.main([str(resolve(None)), "--text", license, "--out", str(out), "--chunk", "128", "--chunks", "2"]) == 0
    )
    found = re.fullmatch(r"temperature ([\d.]+): perplexity ([\d.]+) -> ([\d.]+), wrote .*\n", capsys.readouterr().out)
    assert found and 0.5 < float(found[1]) < 2.0 and float(found[3]) < float(found[2])
    text.write_text("zx qj vk " * 400)
    assert temper.main([str(golden_path("olmoe-f32")), "--text", str(text), "--out", str(out), "--chunk", "64"]) == 2
    assert "no temperature" in capsys.readouterr().err
