"""Experts exchanged in a resident model: the same answers as a file with those weights, and as before when put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from models import golden_path
from toy_dense import write_dense

import edgert
from edgert.errors import ContextLengthError, OptionError, UnsupportedError
from edgert.quant import ggml
from edgert.quant.formats import F16, FORMATS, Matrix
from edgert.storage.gguf_file import GgufFile
from edgert.trial import Trial

TOKENS = np.random.default_rng(5).integers(0, 300, 160).tolist()
CHUNKS = [TOKENS[i : i + 32] for i in range(0, 160, 32)]
TYPES = {"Q8_0": Type.Q8_0, "Q4_0": Type.Q4_0, "Q5_1": Type.Q5_1, "F32": Type.F32}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 2 layers with 6 experts of half floats each."""
    source, changed = golden_path("olmoe-q8_0"), {}
    for layer in (0, 1):
        changed |= experts_as(source, Type.F16, layer)[0]
    return rewritten(source, tmp_path_factory.mktemp("trial") / "tiny.gguf", changed)


@pytest.fixture(scope="module")
def tiny(path: Path) -> Iterator[edgert.Model]:
    """Its model."""
    with edgert.load(path, context=64) as model:
        yield model


def stored(values: Any, kind: Type) -> tuple[Any, Matrix]:
    """A matrix as ggml's bytes, and as edgert's."""
    raw = gguf.quants.quantize(values, kind)
    return raw, ggml.matrix(raw.view(np.uint8).reshape(-1), kind, values.shape, ggml.format_for(kind))


def rewritten(source: Path, target: Path, changed: dict[str, tuple[Any, Type]]) -> Path:
    """A copy of a GGUF file in which some tensors are others, in ggml's bytes."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "olmoe")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        raw, kind = changed.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, np.ascontiguousarray(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def experts_as(source: Path, kind: Type, layer: int) -> tuple[dict[str, tuple[Any, Type]], list[list[Matrix]]]:
    """A layer's stacked tensors in another type, and the same as matrices [expert][gate, up, down]."""
    changed: dict[str, tuple[Any, Type]] = {}
    experts: list[list[Matrix]] = []
    with GgufFile.open(source) as file:
        for name in (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")):
            info = file.tensors[name]
            values = ggml.to_float(file.read(name), info.type, info.shape)
            made = [stored(of_expert, kind) for of_expert in values]
            changed[name] = np.stack([raw for raw, _ in made]), kind
            experts = experts or [[] for _ in made]
            for of_expert, (_, matrix) in zip(experts, made, strict=True):
                of_expert.append(matrix)
    return changed, experts


def three(matrices: Sequence[Matrix]) -> tuple[Matrix, Matrix, Matrix]:
    gate, up, down = matrices
    return gate, up, down


@pytest.mark.parametrize("kind", TYPES)
def test_exchanged_experts_answer_as_a_file_with_those_weights(
    tmp_path: Path, path: Path, tiny: edgert.Model, kind: str
) -> None:
    layer = 1
    before = tiny.logits(TOKENS[:40])
    changed, experts = experts_as(path, TYPES[kind], layer)
    with Trial(tiny) as trial:
        for expert, matrices in enumerate(experts):
            trial.swap(layer, expert, three(matrices))
        exchanged = tiny.logits(TOKENS[:40])
        measured = trial.measure(CHUNKS)
    assert (tiny.logits(TOKENS[:40]) == before).all()
    with edgert.load(rewritten(path, tmp_path / "other.gguf", changed), context=64) as other:
        assert (other.logits(TOKENS[:40]) == exchanged).all()
        found = edgert.divergence.compare(tiny, other, CHUNKS)
    assert (exchanged == before).all() == (kind == "F32")  # half floats are float32s too
    assert np.exp(measured.losses.mean()) == pytest.approx(found.perplexity_after, rel=1e-5)
    assert measured.kl == pytest.approx(found.kl, rel=0.01, abs=3e-6) and measured.top1 == found.top1


@pytest.mark.parametrize(("room", "exact"), [(1 << 20, 1e-9), (0, 1e-6)])
def test_what_is_compared_with_may_be_the_model_as_it_is(
    room: int, exact: float, tmp_path: Path, path: Path, tiny: edgert.Model
) -> None:
    ones, others = (experts_as(path, TYPES["Q4_0"], layer)[1] for layer in (0, 1))
    file, _ = experts_as(path, TYPES["Q4_0"], 0)
    more, _ = experts_as(path, TYPES["Q4_0"], 1)
    with Trial(tiny, most_bytes=room) as trial:
        for expert, matrices in enumerate(ones):
            trial.swap(0, expert, three(matrices))
        trial.compare_with_this(CHUNKS[:3])
        as_it_is = trial.measure(CHUNKS[:3])
        for expert, matrices in enumerate(others):
            trial.swap(1, expert, three(matrices))
        found, untold = trial.measure(CHUNKS[:3]), trial.measure(CHUNKS[3:])
    assert as_it_is.kl == pytest.approx(0, abs=exact) and as_it_is.top1 == 1
    before = edgert.load(rewritten(path, tmp_path / "one.gguf", file), context=64)
    after = edgert.load(rewritten(path, tmp_path / "both.gguf", file | more), context=64)
    with before, after:
        expected = edgert.divergence.compare(before, after, CHUNKS[:3])
        of_the_untouched = edgert.divergence.compare(tiny, after, CHUNKS[3:])
    assert found.kl == pytest.approx(expected.kl, rel=0.01, abs=3e-6) and found.kl > 1e-4
    assert untold.kl == pytest.approx(of_the_untouched.kl, rel=0.01, abs=3e-6)


def test_any_formats_may_stand_side_by_side_and_take_turns(tiny: edgert.Model) -> None:
    before, random = tiny.logits(TOKENS[:20]), np.random.default_rng(1)
    c = tiny.config

    def made(name: str, n_out: int, n_in: int) -> Matrix:
        format = FORMATS[name]
        if not format.is_integer:
            return Matrix(format, random.standard_normal((n_out, n_in)).astype(np.float16 if format is F16 else "f4"))
        values = random.integers(0, 1 << format.bits, (n_out, n_in)).astype(np.uint8)
        scales = random.random((n_out, n_in // format.group)).astype(np.float16) * np.float16(0.01)
        return Matrix(format, values, scales, scales if format.has_minimum else None)

    with Trial(tiny) as trial:
        last = None
        for names in (("int2-g16-min", "int8", "f32"), ("int3", "f16", "int4-min"), ("int6", "int5", "int2")):
            shapes = (c.d_expert, c.d_model), (c.d_expert, c.d_model), (c.d_model, c.d_expert)
            for layer, expert in ((0, 0), (0, 3), (1, 5)):
                trial.swap(layer, expert, three([made(n, *shape) for n, shape in zip(names, shapes, strict=True)]))
            logits = tiny.logits(TOKENS[:20])
            assert np.isfinite(logits).all() and (last is None or not (logits == last).all())
            last = logits
        trial.restore(0, 3)
        trial.restore(0, 3)
        assert not (tiny.logits(TOKENS[:20]) == before).all()
    assert (tiny.logits(TOKENS[:20]) == before).all()


def test_the_untouched_model_is_the_reference_whenever_it_is_first_asked_for(path: Path, tiny: edgert.Model) -> None:
    _, experts = experts_as(path, Type.Q4_0, 0)
    trial = Trial(tiny)
    untouched = trial.measure(CHUNKS[:2])
    assert untouched.kl == 0 and untouched.top1 == 1
    trial.swap(0, 1, three(experts[1]))
    first = trial.measure(CHUNKS)
    forgetful = Trial(tiny, most_bytes=0)
    trial.restore_all()
    forgetful.swap(0, 1, three(experts[1]))
    again = forgetful.measure(CHUNKS)
    assert (again.losses == first.losses).all() and (again.kl, again.top1) == (first.kl, first.top1) and first.kl > 0
    forgetful.restore_all()
    assert (trial.measure(CHUNKS[:2]).losses == untouched.losses).all()
    text = tiny.perplexity("x" * 64, chunk=32)  # the same scoring
    ids = tiny.tokenizer.encode("x" * 64)
    chunks = [ids[i : i + 32] for i in range(0, len(ids) // 32 * 32, 32)]
    assert np.exp(trial.measure(chunks).losses.mean()) == pytest.approx(text.value, rel=1e-5)


def test_the_reference_device_exchanges_experts_too(path: Path) -> None:
    _, experts = experts_as(path, Type.Q8_0, 0)
    logits = []
    for device in ("reference", "auto"):
        with edgert.load(path, context=64, device=device) as model:
            before = model.logits(TOKENS[:9])
            with Trial(model) as trial:
                trial.swap(0, 2, three(experts[2]))
                trial.swap(0, 3, three(experts[3]))
                logits.append(model.logits(TOKENS[:9]))
                assert trial.measure([TOKENS[:9], TOKENS[9:18]]).kl > 0
            assert (model.logits(TOKENS[:9]) == before).all()
    assert (logits[0] == logits[1]).all()


def test_a_session_does_not_answer_from_other_weights(path: Path, tiny: edgert.Model) -> None:
    _, experts = experts_as(path, Type.Q4_0, 0)
    plain = tiny.generate(TOKENS[:30], max_tokens=5)
    with Trial(tiny) as trial:
        for expert, matrices in enumerate(experts):
            trial.swap(0, expert, three(matrices))
        assert tiny.generate(TOKENS[:30], max_tokens=5).usage.cached_tokens == 0
    again = tiny.generate(TOKENS[:30], max_tokens=5)
    assert again.token_ids == plain.token_ids and again.usage.cached_tokens == 0


def test_what_cannot_be_exchanged_is_refused(path: Path, tiny: edgert.Model) -> None:
    _, experts = experts_as(path, Type.F16, 0)
    gate, up, down = experts[0]
    trial = Trial(tiny)
    with pytest.raises(OptionError, match=r"down is .* experts have"):
        trial.swap(0, 0, (gate, up, Matrix(F16, down.values[:32])))
    with pytest.raises(OptionError, match="expert 6 of layer 0 is none of"):
        trial.swap(0, 6, (gate, up, down))
    with pytest.raises(OptionError, match="there is no chunk"):
        trial.measure([])
    with pytest.raises(OptionError, match="it takes at least 4"):
        trial.measure([[1, 2, 3]])
    with pytest.raises(ContextLengthError, match="larger context"):
        trial.measure([TOKENS])
    with pytest.raises(OptionError, match="outside the vocabulary"):
        trial.measure([[1, 2, 3, 300]])
    with edgert.load(golden_path("olmoe-q8_0"), context=64) as model:
        with pytest.raises(UnsupportedError, match="no room for rows of floats"):
            Trial(model).swap(0, 0, (gate, up, down))
    with edgert.load(write_dense(path.parent / "dense.gguf")) as dense, pytest.raises(OptionError, match="no experts"):
        Trial(dense)
    with (
        edgert.load(golden_path("olmoe-q4_0"), context=64, residency="50%") as streamed,
        pytest.raises(OptionError, match="in RAM"),
    ):
        Trial(streamed)
