"""Formats chosen per expert: what a goal means, what is solved for, and bundles whose experts differ in form."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgert.allocating import Problem, record_bytes
from edgert.architectures import read_config
from edgert.bits import Bits, described, expert_shapes, fitting, hot_format
from edgert.errors import ModelFileError, OptionError
from edgert.experts.allocation import allocate
from edgert.experts.profile import Sensitivity
from edgert.experts.speed_allocation import Tier
from edgert.experts.trace import Trace
from edgert.goal import Goal, parse_loss, parse_target
from edgert.pack import Packing, pack_locked
from edgert.pack_place import Place
from edgert.quant.formats import FORMATS, Format
from edgert.quant.quantisers import quantise
from edgert.requantised import RequantisedSource
from edgert.storage.bundle import Bundle
from edgert.storage.gguf_file import GgufFile
from edgert.tile_store import TileStore
from edgert.types import ModelConfig
from edgert.weights import Weights, silent
from tests.models import golden_path

NAMES = ("int2", "int3", "int4", "int8")


def config_of(name: str) -> tuple[Path, ModelConfig]:
    path = golden_path(name)
    with GgufFile.open(path) as file:
        return path, read_config(file.metadata, str(path))


def random_bits(config: ModelConfig, seed: int, hot: Format | None = None) -> Bits:
    """Formats at random, some experts as the source has them."""
    assert config.router is not None
    random = np.random.default_rng(seed)
    formats = tuple(FORMATS[name] for name in NAMES)
    choice = random.integers(-1, len(formats), (config.n_layers, config.router.n_expert, 3))
    for place, (_, n_in) in enumerate(expert_shapes(config)):
        if n_in % 32:  # no format fits such rows
            choice[:, :, place] = -1
    return Bits(formats, choice, hot)


def made_tiles(path: Path, config: ModelConfig, bits: Bits) -> dict[tuple[int, int, int], Any]:
    """Tiles of all that `bits` chooses, rounded to the nearest."""
    tiles = {}
    with GgufFile.open(path) as file:
        weights = Weights(file, config)
        for layer, expert in np.ndindex(*bits.choice.shape[:2]):
            found = weights.expert(layer, expert)
            for place, (matrix, format) in enumerate(
                zip((found.gate, found.up, found.down), bits.of(layer, expert), strict=True)
            ):
                if format is not None:
                    made = quantise(matrix.whole().to_float(), format, "rtn").matrix
                    tiles[layer, expert, place] = np.zeros(format.matrix_bytes(*matrix.shape), np.uint8)
                    made.pack(tiles[layer, expert, place])
    return tiles


def packed(path: Path, out: Path, bits: Bits, tiles: dict[tuple[int, int, int], Any]) -> None:
    """A bundle with those bits."""
    with contextlib.closing(GgufFile.open(path)) as file:
        source = RequantisedSource(file, bits, lambda place, first, n: tiles[place][first : first + n])
        packing = Packing(file, silent, source)
        packing.manifest.bits = {"asked": {"bits": bits.digest()}}

        def run(place: Place) -> tuple[int, int]:
            written = packing.fill(place)
            place.publish()
            return written

        pack_locked(file, path, out, {"bits": bits.digest()}, silent, run)


@pytest.mark.parametrize("name", ["llama-f32", "qwen3moe-f32", "granitemoe-shared-f32"])
@pytest.mark.parametrize("hot", [None, "int8", "int4"])
def test_a_bundle_holds_what_was_made_for_each_expert(name: str, hot: str | None, tmp_path: Path) -> None:
    path, config = config_of(name)
    bits = random_bits(config, 3, FORMATS[hot] if hot else None)
    tiles = made_tiles(path, config, bits)
    out = tmp_path / "mixed.edge"
    packed(path, out, bits, tiles)
    with GgufFile.open(path) as file, Bundle.open(out) as bundle:
        ours, theirs = Weights(bundle, config), Weights(file, config)
        for layer, expert in np.ndindex(*bits.choice.shape[:2]):
            pairs = zip(bits.of(layer, expert), ours_and_theirs(ours, theirs, layer, expert), strict=True)
            for place, (format, (mine, source)) in enumerate(pairs):
                assert mine.format == (format or source.format)
                if format is None:
                    assert np.array_equal(mine.whole().to_float(), source.whole().to_float())
                else:
                    got = np.zeros(format.matrix_bytes(*mine.shape), np.uint8)
                    mine.pack(got)
                    assert np.array_equal(got, tiles[layer, expert, place])
        query = ours.layer(0).mixer.query.matrix
        assert query.format.name == (hot or "f32") and query.shape[1] % 32 == 0
        source_query = theirs.layer(0).mixer.query.matrix.whole().to_float()
        step = np.abs(source_query).max() / (2 ** ((FORMATS[hot].bits if hot else 24) - 1) - 1)
        assert np.abs(query.whole().to_float() - source_query).max() <= step
        rows, source_rows = ours.embed([5, 0, 5]), theirs.embed([5, 0, 5])
        assert bundle.table.type.name == ("Q8_0" if hot else "F32")
        assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows, source_rows) is (hot is None)
        rounding = 0.5 / 127 + 2.0**-11 if hot else 0.0  # half a step, and scales in half floats
        assert np.abs(rows - source_rows).max() <= rounding * np.abs(source_rows).max()
        router = ours.layer(0).router
        assert router is not None and router.matrix.format.name == "f32"  # decides much, and is small
        assert {format.name for format in ours.formats()} >= {FORMATS[n].name for n in NAMES}
        sizes = [ours.sizes_of(f"blk.0.ffn_{part}_exps.weight") for part in ("gate", "up", "down")]
        on_file = sum(sum(size.values()) for size in sizes)
        assert on_file <= bundle.record_bytes[0].sum() < on_file + 4096 * bundle.record_bytes.shape[1]


def test_an_embedding_table_that_is_not_finite_is_not_rounded(tmp_path: Path) -> None:
    path, config = config_of("qwen3moe-f32")
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(path, broken)
    (table,) = (t for t in gguf.GGUFReader(broken, "r+").tensors if t.name == "token_embd.weight")
    table.data[7, 3] = np.inf
    table.data.flush()
    bits = random_bits(config, 3, FORMATS["int8"])
    with pytest.raises(ModelFileError, match=r"token_embd\.weight holds a weight that is infinite"):
        packed(broken, tmp_path / "m.edge", bits, made_tiles(path, config, bits))


def ours_and_theirs(ours: Weights, theirs: Weights, layer: int, expert: int) -> Any:
    a, b = ours.expert(layer, expert), theirs.expert(layer, expert)
    return zip((a.gate, a.up, a.down), (b.gate, b.up, b.down), strict=True)


def test_the_same_bits_are_packed_once_and_do_not_give_way_to_others(tmp_path: Path) -> None:
    path, config = config_of("olmoe-f32")
    out, first, second = tmp_path / "m.edge", random_bits(config, 1), random_bits(config, 2)
    packed(path, out, first, made_tiles(path, config, first))
    before = (out / "experts.bin").stat()
    packed(path, out, first, {})  # nothing is asked for again
    assert (out / "experts.bin").stat().st_ino == before.st_ino
    with pytest.raises(OptionError, match="name another folder for it, or remove m"):
        packed(path, out, second, made_tiles(path, config, second))
    assert (out / "experts.bin").stat().st_ino == before.st_ino


def test_a_tile_store_keeps_what_is_made_under_its_header_alone(tmp_path: Path) -> None:
    store = TileStore(tmp_path / "tiles", {"quantiser": "gptq"})
    tiles = np.arange(200, dtype=np.uint8)
    assert not store.has((0, 1, 2), "int4")
    store.put((0, 1, 2), "int4", tiles)
    again = TileStore(tmp_path / "tiles", {"quantiser": "gptq"})
    assert again.has((0, 1, 2), "int4") and not again.has((0, 1, 2), "int3")
    assert np.array_equal(again.read((0, 1, 2), "int4", 50, 20), tiles[50:70])
    with pytest.raises(Exception, match="gone"):
        again.read((0, 1, 2), "int4", 150, 100)
    assert not TileStore(tmp_path / "tiles", {"quantiser": "rtn"}).has((0, 1, 2), "int4")


def sensitivity(config: ModelConfig, seed: int = 0) -> Sensitivity:
    """Errors that fall by four with each bit, and differ between experts by far more; one was never routed to."""
    assert config.router is not None
    random = np.random.default_rng(seed)
    shape = (config.n_layers, config.router.n_expert, 3, 1)
    fall = np.array([4.0 ** -FORMATS[name].bits for name in NAMES])
    rows = random.integers(10, 500, shape[:2]).astype(np.int32)
    rows[0, 1] = 0
    errors = (random.lognormal(0, 2, shape) * fall).astype(np.float32)
    return Sensitivity("gptq", NAMES, errors, rows, np.ones(config.n_layers, np.float32), 1000)


def test_sizes_and_losses_of_a_solution_are_those_of_its_formats() -> None:
    _, config = config_of("llama-f32")
    found = sensitivity(config)
    problem = Problem(found, config)
    for bpw in (2.7, 3.0, 4.2, 8.0):
        solution = problem.within_bytes(int(bpw * problem.n_weights / 8))
        n_bytes, loss = 0, 0.0
        for layer, expert, place in np.ndindex(*solution.bits.choice.shape):
            format = solution.bits.of(layer, expert)[place]
            assert format is not None
            n_bytes += format.matrix_bytes(*expert_shapes(config)[place])
            if found.rows[layer, expert]:
                loss += float(found.loss()[layer, expert, place, NAMES.index(format.name)])
        assert n_bytes == solution.n_bytes <= bpw * problem.n_weights / 8
        assert loss == pytest.approx(solution.loss, rel=1e-5) and solution.bound <= solution.loss * 1.0000001
        again = problem.within_loss(solution.loss)
        assert again.n_bytes <= solution.n_bytes


def test_an_expert_that_was_never_routed_to_stays_at_four_bits() -> None:
    _, config = config_of("llama-f32")
    problem = Problem(sensitivity(config), config)
    assert problem.never_routed == [(0, 1)]
    for solution in (problem.smallest(), problem.largest()):
        assert {format.name for format in solution.bits.of(0, 1) if format} == {"int4"}


def with_a_dense_layer(found: Sensitivity) -> Sensitivity:
    """The same with a layer before the others in which nothing is routed; what it has of errors means nothing."""
    rows, gains, errors = (
        np.concatenate([fill, table]).astype(table.dtype)
        for fill, table in (
            (np.zeros_like(found.rows[:1]), found.rows),
            (np.ones(1), found.gains),
            (np.full_like(found.errors[:1], np.nan), found.errors),
        )
    )
    return replace(found, rows=rows, gains=gains, errors=errors)


def test_layers_without_experts_are_no_part_of_sizes_and_choices() -> None:
    _, config = config_of("llama-f32")
    problem = Problem(sensitivity(config), config)
    deeper = Problem(with_a_dense_layer(sensitivity(config)), replace(config, n_layers=config.n_layers + 1))
    assert deeper.layers.tolist() == [layer + 1 for layer in problem.layers.tolist()]
    assert deeper.n_weights == problem.n_weights and deeper.most_bytes == problem.most_bytes
    assert deeper.never_routed == [(1, 1)]
    found, expected = (one.within_bytes(int(3.2 * problem.n_weights / 8)) for one in (deeper, problem))
    assert (found.n_bytes, found.loss) == (expected.n_bytes, expected.loss)
    assert np.array_equal(found.bits.choice[1:], expected.bits.choice)
    assert found.bits.of(0, 0) == (None, None, None)
    assert described(found.bits, config) == described(expected.bits, config)
    assert record_bytes(deeper.shapes, found.bits) == record_bytes(problem.shapes, expected.bits)
    nothing = sensitivity(config)
    with pytest.raises(OptionError, match="no token was routed"):
        Problem(replace(nothing, rows=np.zeros_like(nothing.rows)), config)


def made_trace(found: Sensitivity, seed: int) -> Trace:
    """Routes as often to each expert as its rows say; a layer without any has no records."""
    random, n_expert = np.random.default_rng(seed), found.rows.shape[1]
    chances = np.where(found.rows.any(axis=1, keepdims=True), found.rows, 1.0)
    ids = np.array([random.choice(n_expert, (300, 1), p=row / row.sum()) for row in chances], np.uint8)
    sizes = np.repeat(np.where(found.rows.any(axis=1), 4096, 0)[:, None], n_expert, axis=1)
    return Trace.without_scores("made", sizes, ids, np.ones(ids.shape, np.float16))


def test_bits_for_speed_keep_the_loss_and_skip_layers_without_experts() -> None:
    _, config = config_of("llama-f32")
    found = with_a_dense_layer(sensitivity(config))
    problem, trace = Problem(found, config), made_trace(found, 1)
    loss = problem.within_bytes(int(3.5 * problem.n_weights / 8)).loss
    solution = problem.fastest(trace, Tier(problem.most_bytes // 4, 1e9), loss, silent)
    assert solution.loss <= loss and solution.n_bytes >= problem.within_loss(loss).n_bytes
    assert solution.bits.of(0, 0) == (None, None, None) and solution.bits.choice.shape[0] == config.n_layers + 1


def test_no_solution_uses_more_formats_than_are_worth_compiling() -> None:
    _, config = config_of("llama-f32")
    config = replace(config, d_model=256, d_expert=256)
    names = ("int2-g128", "int2", "int2-k", "int3-g64", "int3", "int3-k", "int4-g128", "int4", "int4-k", "int5", "int8")
    random, few = np.random.default_rng(4), sensitivity(config)
    bits = np.array([8 * FORMATS[name].matrix_bytes(256, 256) / 256**2 for name in names])
    errors = np.exp(random.normal(0, 3, (*few.rows.shape, 3, 1))) * 4.0**-bits
    found = replace(few, formats=names, errors=errors.astype(np.float32))
    problem, trace = Problem(found, config), made_trace(found, 2)
    size = int(3.5 * problem.n_weights / 8)
    loss = problem.within_bytes(size).loss
    for solution in (
        problem.within_bytes(size),
        problem.within_loss(loss),
        problem.fastest(trace, Tier(size // 3, 1e9), loss, silent),
    ):
        assert solution.n_bytes <= 1.2 * size and solution.loss <= loss * 1.000001
        assert 3 < len(np.unique(solution.bits.choice)) <= 8
    assert len(np.unique(allocate(problem.sizes, problem.losses, most_bytes=size).choice)) > 8


def test_records_with_their_padding_stay_within_a_size() -> None:
    _, config = config_of("llama-f32")
    problem = Problem(sensitivity(config), config)
    least, most = (record_bytes(problem.shapes, s.bits) for s in (problem.smallest(), problem.largest()))
    for n_bytes in (least, (least + most) // 2, most):
        assert record_bytes(problem.shapes, problem.within_records(n_bytes + 7, 7).bits) <= n_bytes
    with pytest.raises(OptionError, match=rf"{least:,} of them experts; use --size {least + 7}B"):
        problem.within_records(least + 6, 7)


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.5 %", 0.005), (" 10%", 0.1)])
def test_a_bound_on_the_loss_is_read(text: str, value: float) -> None:
    assert parse_loss(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "-1%", "0", "two", "2000%", "nan", "inf%"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--loss"):
        parse_loss(text)


@pytest.mark.parametrize(("text", "words"), [("2", "write --loss 2%"), ("0.02", "write --loss 0.02%, or 2%")])
def test_a_bound_without_a_unit_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_loss(text)
    assert str(refused.value).endswith(words)


def test_sizes_are_bits_per_weight_or_bytes() -> None:
    assert parse_target("3.0bpw") == {"bits_per_weight": 3.0} == parse_target("3 BPW")
    assert parse_target("8GiB") == {"n_bytes": 8 << 30}
    for text in ("0.5bpw", "99bpw", "bpw", "three", "3.0", "0.5", "50%", "8000000"):
        with pytest.raises(OptionError, match="bpw"):
            parse_target(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "--loss 2%"),
        ({"loss": 0.02, "n_bytes": 1 << 30}, "either"),
        ({"objective": "speed", "bits_per_weight": 3.0}, "add --loss"),
        ({"method": "edgemoe", "bits_per_weight": 3.0}, "add --loss"),
        ({"format": "int4", "loss": 0.02}, "leave --loss"),
        ({"format": "int7"}, "int7"),
        ({"format": "f16"}, "integers"),
        ({"loss": 0.02, "objective": "fast"}, "--objective 'fast' is not known; use one of size, speed"),
        ({"loss": 0.02, "method": "magic"}, "--method 'magic' is not known; use one of optimal, edgemoe"),
        ({"loss": 0.02, "hot": 3}, "--hot 3"),
        ({"loss": 0.02, "quantiser": "GPTQ"}, "--quantiser 'GPTQ' is not known; use one of rtn, hqq, awq, gptq"),
        ({"loss": 0.02, "objective": "speed", "memory": 1 << 30, "method": "edgemoe"}, "no speed"),
        ({"loss": 0.02, "objective": "speed"}, "add --memory"),
    ],
)
def test_goals_that_contradict_themselves_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Goal(**fields)


def test_hot_weights_never_grow_and_never_fall_below_four_bits() -> None:
    from gguf import GGMLQuantizationType as Type

    _, config = config_of("llama-f32")
    bits = random_bits(config, 0, hot_format(8))
    assert bits.hot_format(Type.F16, 64).name == "int8" == bits.hot_format(Type.F32, 64).name
    assert bits.hot_format(Type.Q8_0, 64).name == "int8" and bits.hot_format(Type.Q4_1, 64).name == "int4-min"
    assert bits.hot_format(Type.F16, 72).name == "f16"  # rows that do not fill a group
    assert bits.table_type(Type.F16, 64) is Type.Q8_0 is bits.table_type(Type.Q8_0, 64)
    assert bits.table_type(Type.Q6_K, 256) is Type.Q6_K and bits.table_type(Type.BF16, 72) is Type.BF16
    with pytest.raises(OptionError, match="3 bits"):
        hot_format(3)


def test_only_formats_that_fit_a_row_are_offered() -> None:
    formats = [FORMATS[name] for name in ("int4", "int4-g64", "int4-g128", "int4-k", "int3-g16")]
    assert [formats[i].name for i in fitting(formats, 64)] == ["int4", "int4-g64", "int3-g16"]
    assert [formats[i].name for i in fitting(formats, 576)] == ["int4", "int4-g64", "int3-g16"]
