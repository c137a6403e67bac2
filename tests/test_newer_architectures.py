"""The architectures beyond the first five: their real sizes, their variants in files, and what of them is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_models import Tensors, rewritten
from models import engine_of, golden, golden_path, run

from edgert.architectures import read_config
from edgert.devices import buffers
from edgert.devices.cpu import CpuDevice
from edgert.devices.reference import ReferenceDevice
from edgert.devices.selection import beyond_attention, beyond_experts, parse
from edgert.devices.work_space import work_bytes
from edgert.errors import EdgertError, ModelFileError, OptionError, UnsupportedError
from edgert.plan_model import open_plan_model
from edgert.preset_keys import KEY_PRESETS
from edgert.presets import PRESETS
from edgert.storage.gguf_file import GgufFile
from edgert.tensor_table import EMBEDDING, HEAD
from edgert.weights import Weights

MIB = 1 << 20


def metadata(name: str) -> dict[str, Any]:
    with GgufFile.open(golden_path(name)) as file:
        return {key: file.metadata[key] for key in file.metadata}


# ---- real sizes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KEY_PRESETS)
def test_tables_of_tensors_add_up_to_what_the_makers_say(name: str) -> None:
    """Parameters of the real models, within the published tenth of a billion; and a floor far below the file."""
    preset, model = KEY_PRESETS[name], open_plan_model(name)
    assert abs(model.n_parameters / 1e9 - preset.billions) < 0.1
    needed = model.needs(4096, "f16", 4)
    assert needed.hot + needed.cold < 1.1 * model.file_bytes
    assert needed.floor().total < 0.25 * model.file_bytes < needed.plan(512).total
    sizes, config = model.record_bytes, model.config
    assert np.flatnonzero(sizes.any(axis=1)).tolist() == config.expert_layers and sizes.sum() == needed.cold
    assert needed.working_set == needed.cold * needed.top_k // sizes.shape[1]


@pytest.mark.parametrize(
    ("name", "routed", "norm"), [("llama-4-scout", range(48), "unit"), ("llama-4-maverick", range(1, 48, 2), "none")]
)
def test_where_llama_4_has_experts(name: str, routed: range, norm: str) -> None:
    """Maverick in every other layer, the first being dense, and without a norm of queries and keys."""
    model = open_plan_model(name)
    assert model.config.expert_layers == list(routed) and model.config.qk_norm == norm
    assert round(model.active_parameters / 1e9 + 0.5) == 17  # as its makers count them, with the embedding table
    shapes = model.weights.shapes
    n_expert = model.config.router.n_expert if model.config.router else 0
    for layer in range(48):
        parts = {key.split(".")[2]: shape for key, shape in shapes.items() if key.startswith(f"blk.{layer}.ffn_up")}
        if layer in routed:
            assert parts == {"ffn_up_exps": (n_expert, 8192, 5120), "ffn_up_shexp": (8192, 5120)}
        else:
            assert parts == {"ffn_up": (16384, 5120)}


@pytest.mark.parametrize(
    ("name", "same", "title", "context"),
    [
        ("deepseek-r1", "deepseek-v3", "DeepSeek-R1", 163840),
        ("deepseek-v3.1", "deepseek-v3", "DeepSeek-V3.1", 163840),
        ("glm-4.6", "glm-4.5", "GLM-4.6", 202752),
        ("qwen3-coder-30b-a3b", "qwen3-30b-a3b", "Qwen3-Coder-30B-A3B", 262144),
    ],
)
def test_models_of_the_same_dimensions(name: str, same: str, title: str, context: int) -> None:
    found, other = open_plan_model(name.upper()), open_plan_model(same)
    assert (found.name, found.config.n_context) == (title, context) and other.name != title
    assert found.weights.file.tensors == other.weights.file.tensors
    assert replace(found.config, n_context=other.config.n_context, rope=other.config.rope) == other.config


def test_glm_4_7_flash_routes_by_sigmoid() -> None:
    """Without a key for it, as in its files; with scores of its own size: no YaRN, heads of 192 and 64 numbers."""
    config = open_plan_model("glm-4.7-flash").config
    assert config.router and (config.router.gating, config.router.scale) == ("sigmoid", 1.8)
    assert config.attention_scale == 256**-0.5 and config.n_unused_layers == 0


class Pieces:
    """Stands for an arena's memory, of any size: how far each piece is filled."""

    def __init__(self) -> None:
        self.filled: list[int] = []

    def piece(self, n_bytes: int) -> Any:
        self.filled.append(0)
        return np.broadcast_to(np.uint8(0), n_bytes)

    def unused(self, sizes: list[int]) -> int:
        """What the huge pages of an arena hold beside weights of these sizes, taken one after the other."""
        arena = buffers.Arena()
        for n_bytes in sizes:
            arena.take(n_bytes)
            self.filled[-1] = arena._used
        return sum(buffers.round_up(filled, 2 * MIB) for filled in self.filled) - sum(sizes)


@pytest.mark.parametrize("quantisation", ["q4_k_m", "bf16"])
@pytest.mark.parametrize("name", [*PRESETS, *KEY_PRESETS])
def test_huge_pages_are_planned_for_weights_in_ram_alone(
    name: str, quantisation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At real sizes, with experts on flash and in RAM: what is taken is planned for, and no experts that are not there.

    Only where experts are in RAM do they lie in an arena: else in one buffer, which slots count.
    """
    model = open_plan_model(f"{name}:{quantisation}")
    weights, needed = model.weights, model.needs(4096, "f16", 4)
    hot, whole = list[int](), list[int]()
    for layer in range(model.config.n_layers):
        names = (name for name, shape in weights.shapes.items() if name.startswith(f"blk.{layer}.") and len(shape) > 1)
        matrices = [weights.bytes_of(name) for name in names if not weights.is_cold(name)]
        hot += matrices
        whole += matrices + [n_bytes for n_bytes in model.record_bytes[layer].tolist() if n_bytes]
    for sizes in (hot, whole):
        sizes.append(weights.bytes_of(HEAD if HEAD in weights.shapes else EMBEDDING))
    in_floats = quantisation == "bf16" and not name.startswith("gpt-oss")  # whose experts are MXFP4
    work = work_bytes(model.config, 4096, 4, float_hidden=in_floats, chunk=32)
    for sizes, slots in ((hot, needed.least_slots), (whole, 0)):
        pieces = Pieces()
        monkeypatch.setattr(buffers, "huge_pages", pieces.piece)
        planned = needed.plan(32, slots).work - work
        assert 0 <= pieces.unused(sizes) <= planned <= 4 * MIB + sum(sizes) // 100


@pytest.mark.parametrize(("name", "n_layers"), [("deepseek-v2-lite", 27), ("kimi-k2", 61), ("glm-4.7-flash", 47)])
def test_what_a_cache_of_latent_vectors_needs(name: str, n_layers: int) -> None:
    """576 numbers of a token and layer, in what is planned as in the ledger."""
    needed = open_plan_model(name).needs(4096, "f16", 4)
    assert {*needed.kv.values()} == {needed.plan(512).kv} == {n_layers * 4096 * 576 * 2}


# ---- other forms of the same model -----------------------------------------------------------------------------------
def test_an_input_matrix_of_delta_nets_in_the_older_order(tmp_path: Path) -> None:
    """ssm_in, grouped by key head, instead of attn_qkv and attn_gate."""

    def join(tensors: Tensors) -> None:
        for layer in (0, 1, 2):
            mixed, gate = (tensors.pop(f"blk.{layer}.{part}.weight") for part in ("attn_qkv", "attn_gate"))
            query, key, value = np.split(mixed, (32, 64))  # two key heads and four value heads of 16
            parts = (
                query.reshape(2, 16, 64),
                key.reshape(2, 16, 64),
                value.reshape(2, 32, 64),
                gate.reshape(2, 32, 64),
            )
            tensors[f"blk.{layer}.ssm_in.weight"] = np.concatenate(parts, axis=1).reshape(-1, 64)

    path = rewritten("qwen3next-f32", tmp_path / "older.gguf", join)
    tokens = golden("qwen3next-f32")[1]["tokens"].tolist()
    assert (run(*engine_of(path), tokens) == run(*engine_of(golden_path("qwen3next-f32")), tokens)).all()


@pytest.mark.parametrize("device", [CpuDevice, ReferenceDevice])
def test_attention_in_one_matrix_with_a_bias(tmp_path: Path, device: Any) -> None:
    def join(tensors: Tensors) -> None:
        for layer in (0, 1, 2):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{layer}.attn_{name}.{kind}") for name in "qkv"]
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)

    path, tokens = rewritten("glm4moe-f32", tmp_path / "joined.gguf", join), list(range(20, 40))
    expected = run(*engine_of(golden_path("glm4moe-f32"), device=device), tokens)
    assert (run(*engine_of(path, device=device), tokens) == expected).all()


def test_what_need_not_be_there(tmp_path: Path) -> None:
    """GLM-4.5-Air norms neither q nor k; a bailingmoe2 may have no biases for the choice. Others are missed."""

    def without(*parts: str) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if any(part in name for part in parts)]:
                del tensors[name]

        return change

    for name, part in (("glm4moe-f32", "attn_q_norm"), ("bailingmoe2-f32", "exp_probs_b")):
        parts = (part, part.replace("_q_", "_k_"))
        engine, session = engine_of(rewritten(name, tmp_path / f"{name}.gguf", without(*parts)))
        assert np.isfinite(run(engine, session, [1, 2, 3])).all()
    for name, part in (("glm4moe-f32", "exp_probs_b"), ("gpt-oss-f32", "attn_sinks"), ("qwen3moe-f32", "attn_q_norm")):
        path = rewritten(name, tmp_path / "less.gguf", without(part))
        with GgufFile.open(path) as file, pytest.raises(ModelFileError, match=f"{part}.* is missing"):
            Weights(file, read_config(file.metadata, str(path)))


def test_layers_that_predict_further_are_left_out() -> None:
    with GgufFile.open(golden_path("glm4moe-f32")) as file:
        config = read_config(file.metadata, "m")
        weights = Weights(file, config)
        assert config.n_layers == 2 and config.n_unused_layers == 1
        assert not any(name.startswith("blk.2.") for name in weights.shapes)
        assert any(name.startswith("blk.2.") for name in file.tensors)


def test_divisors_for_short_and_for_long_contexts() -> None:
    with GgufFile.open(golden_path("phimoe-f32")) as file:
        weights = Weights(file, read_config(file.metadata, "m"))
        short, long = (weights.rope_divisors(n) for n in (4096, 4097))
        assert short is not None and long is not None and not np.array_equal(short, long)
        stored = file.read("rope_factors_long.weight").view(np.float32)
        assert np.array_equal(long, stored)


def test_divisors_apply_whatever_the_scaling_is_called(tmp_path: Path) -> None:
    """Files of Phi-3.5-MoE name none. A factor beside it divides too, as in llama.cpp."""
    path, tokens = golden_path("phimoe-f32"), golden("phimoe-f32")[1]["tokens"].tolist()
    unnamed = rewritten("phimoe-f32", tmp_path / "unnamed.gguf", rope__scaling__type=None)
    for n_context in (64, 4160):  # up to the original context, and beyond
        expected, found = (run(*engine_of(one, n_context=n_context), tokens) for one in (path, unnamed))
        assert (expected == found).all()
    keys = metadata("phimoe-f32") | {"phimoe.rope.scaling.factor": 4.0}
    rope = read_config(keys, "m").rope
    del keys["phimoe.rope.scaling.type"]
    assert rope == read_config(keys, "m").rope and (rope.scaling, rope.factor) == ("linear", 4.0)


def test_scores_under_yarn_without_its_multiplier() -> None:
    """Then cos, sin and scores all grow by 1 + 0.1 ln(factor); with it scores alone, by as much times it."""
    keys = metadata("deepseek2-lite-f32")
    config = read_config(keys, "m")
    assert config.rope.magnitude == 1.0
    grown = 1 + 0.1 * 10 * 0.0707 * np.log(40.0)
    assert np.isclose(config.attention_scale, grown**2 * 24**-0.5)
    del keys["deepseek2.rope.scaling.yarn_log_multiplier"]
    plain = read_config(keys, "m")
    assert np.isclose(plain.rope.magnitude, 1 + 0.1 * np.log(40.0))
    assert np.isclose(plain.attention_scale, plain.rope.magnitude**2 * 24**-0.5)
    assert read_config(keys | {"deepseek2.rope.scaling.yarn_log_multiplier": 0.0}, "m") == plain


@pytest.mark.parametrize(
    ("architecture", "left_out", "same"),
    [
        ("hunyuan-moe", {"expert_shared_feed_forward_length": 24}, {"feed_forward_length": 24}),
        ("qwen3next", {"expert_shared_feed_forward_length": 48}, {"feed_forward_length": 48}),
        ("qwen35moe", {"expert_shared_feed_forward_length": 48}, {"feed_forward_length": 48}),
        ("qwen3next", {"expert_feed_forward_length": 16}, {"feed_forward_length": 32}),  # of two experts together
        ("qwen35moe", {"expert_feed_forward_length": 16}, {"feed_forward_length": 32}),
        ("deepseek2", {"rope.scaling.original_context_length": 400}, {"context_length": 400}),
    ],
)
def test_sizes_that_files_leave_out(architecture: str, left_out: dict[str, int], same: dict[str, int]) -> None:
    """llama.cpp takes another key for one that is 0 or not there."""
    full = metadata({"deepseek2": "deepseek2-v3"}.get(architecture, architecture) + "-f32")
    full |= {f"{architecture}.{key}": value for key, value in (same | left_out).items()}
    (key,) = (f"{architecture}.{key}" for key in left_out)
    expected = read_config(full, "m")
    assert read_config(full | {key: 0}, "m") == expected
    assert read_config({name: value for name, value in full.items() if name != key}, "m") == expected


@pytest.mark.parametrize("window", [16, 8192])
def test_a_window_of_llama4_says_nothing(window: int) -> None:
    """llama.cpp takes the same stretches of positions whatever the key says, unless it is 0."""
    keys = metadata("llama4-f32")
    assert read_config(keys | {"llama4.attention.sliding_window": window}, "m") == read_config(keys, "m")


@pytest.mark.parametrize(
    ("n_layers", "n_unused", "n_vocab", "gating"),
    [
        (47, 0, 154880, "sigmoid"),  # GLM-4.7-Flash
        (48, 1, 154880, "sigmoid"),  # with the layer that predicts further
        (48, 0, 154880, "sigmoid"),
        (27, 0, 102400, "softmax"),  # DeepSeek-V2-Lite, in files older than the key
        (60, 0, 102400, "softmax"),  # DeepSeek-V2
        (48, 0, 128256, "softmax"),
        (46, 0, 154880, "softmax"),
    ],
)
def test_gating_of_deepseek_that_a_file_does_not_name(n_layers: int, n_unused: int, n_vocab: int, gating: str) -> None:
    """As llama.cpp takes it."""
    sizes = {"block_count": n_layers, "nextn_predict_layers": n_unused, "vocab_size": n_vocab}
    keys = metadata("deepseek2-v3-f32") | {f"deepseek2.{key}": value for key, value in sizes.items()}
    key = "deepseek2.expert_gating_func"
    for unnamed in ({name: value for name, value in keys.items() if name != key}, keys | {key: 0}):
        router = read_config(unnamed, "m").router
        assert router is not None and router.gating == gating
    for number, named in ((1, "softmax"), (2, "sigmoid")):
        router = read_config(keys | {key: number}, "m").router
        assert router is not None and router.gating == named


SOFTMAX = ("llama", "olmoe", "qwen2moe", "qwen3moe", "granitemoe", "phimoe", "ernie4_5-moe", "hunyuan-moe", "qwen3next")


@pytest.mark.parametrize("architecture", SOFTMAX)
def test_gating_of_families_that_have_one(architecture: str) -> None:
    """llama.cpp routes these by softmax and does not read the key: another function is not theirs."""
    keys, key = metadata(f"{architecture}-f32"), f"{architecture}.expert_gating_func"
    plain = read_config({name: value for name, value in keys.items() if name != key}, "m")
    assert plain.router is not None and plain.router.gating == "softmax"
    assert read_config(keys | {key: 1}, "m") == read_config(keys | {key: 0}, "m") == plain
    for number in (2, 3):
        with pytest.raises(UnsupportedError, match=rf"{key} is {number}; supported are 1 \(softmax\)$"):
            read_config(keys | {key: number}, "m")


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "key", "value", "kind", "message"),
    [
        ("dots1-f32", "expert_gating_func", 4, UnsupportedError, "expert_gating_func is 4; supported are 1 (softmax)"),
        ("gpt-oss-f32", "expert_gating_func", 1, UnsupportedError, "supported are 3 (softmax over the chosen)"),
        ("deepseek2-v3-f32", "expert_group_count", 3, ModelFileError, "a divisor of expert_count = 16"),
        ("deepseek2-v3-f32", "expert_group_used_count", 5, ModelFileError, "a whole number from 1 to 4"),
        ("deepseek2-v3-f32", "leading_dense_block_count", 3, ModelFileError, "less than the 3 layers that run"),
        ("deepseek2-v3-f32", "attention.kv_lora_rank", 24, UnsupportedError, "kv_lora_rank is 24; supported is a mul"),
        ("deepseek2-v3-f32", "rope.scaling.type", "longrope", UnsupportedError, "supported are none, linear, yarn"),
        ("deepseek2-v3-f32", "attention.temperature_length", 8192, UnsupportedError, "temperature_length = 8192"),
        ("glm4moe-f32", "nextn_predict_layers", 3, ModelFileError, "less than block_count = 3"),
        ("dots1-f32", "nextn_predict_layers", 1, UnsupportedError, "nextn_predict_layers = 1 is not supported"),
        (
            "lfm2moe-f32",
            "attention.head_count_kv",
            np.array([0, 1, 2, 0]),
            UnsupportedError,
            "one number in all layers",
        ),
        ("lfm2moe-f32", "attention.head_count_kv", np.array([0, 2]), ModelFileError, "for each of 4 layers"),
        ("qwen3next-f32", "ssm.time_step_rank", 3, ModelFileError, "a multiple of ssm.group_count = 2"),
        ("qwen3next-f32", "ssm.inner_size", 48, ModelFileError, "times ssm.state_size = 64"),
        ("qwen3next-f32", "ssm.state_size", 8, UnsupportedError, "ssm.state_size is 8; supported is a multiple of 16"),
        (
            "llama4-f32",
            "attention.sliding_window",
            0,
            UnsupportedError,
            "sliding_window is 0; supported is a model who",
        ),
        ("llama4-f32", "block_count", 1 << 20, ModelFileError, "block_count is 1048576, not at most 4096"),
        ("ernie4_5-moe-f32", "interleave_moe_layer_step", None, ModelFileError, "interleave_moe_layer_step is missing"),
        ("bailingmoe2-f32", "expert_gating_func", None, ModelFileError, "expert_gating_func is missing"),
        ("dots1-f32", "expert_gating_func", None, ModelFileError, "the key dots1.expert_gating_func is missing"),
        ("dots1-f32", "expert_gating_func", 0, ModelFileError, "expert_gating_func is 0, not a whole number from 1"),
    ],
)
def test_refusals_name_the_key_and_the_value(
    name: str, key: str, value: Any, kind: type[EdgertError], message: str
) -> None:
    changed = metadata(name)
    full = f"{changed['general.architecture']}.{key}"
    if value is None:
        del changed[full]
    else:
        changed[full] = value
    with pytest.raises(kind) as caught:
        read_config(changed, "some.gguf")
    assert message in str(caught.value) and str(caught.value).startswith("some.gguf") and "\n" not in str(caught.value)


def test_metadata_that_contradict_tensors_name_both() -> None:
    changed = metadata("qwen3next-f32") | {"qwen3next.ssm.conv_kernel": 3}
    with GgufFile.open(golden_path("qwen3next-f32")) as file:
        with pytest.raises(ModelFileError, match=r"ssm_conv1d\.weight has shape \(128, 4\).*ask for \(384,\)"):
            Weights(file, read_config(changed, "m"))


@pytest.mark.parametrize("name", ["gpt-oss-f32", "deepseek2-v3-f32", "qwen3next-f32", "lfm2moe-f32", "llama4-f32"])
def test_devices_of_onnx_runtime_are_refused_by_what_they_lack(name: str) -> None:
    config = read_config(metadata(name), "m")
    assert beyond_attention(config)
    message = f"device='onnx:cpu' does not have {beyond_attention(config)}, which {config.architecture} needs; use cpu"
    with pytest.raises(OptionError, match=message):
        parse("onnx:cpu").make(config, 64)
    assert bool(beyond_experts(config)) == (name != "qwen3next-f32")


@pytest.mark.parametrize("name", ["llama-f32", "olmoe-f32", "qwen2moe-f32", "qwen3moe-f32", "granitemoe-shared-f32"])
def test_the_first_five_are_not(name: str) -> None:
    config = read_config(metadata(name), "m")
    assert beyond_attention(config) == beyond_experts(config) == ""
