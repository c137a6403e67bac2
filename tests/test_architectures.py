"""What a file asks for and edgert does not do is refused by name, at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_models import Tensors, rewritten
from models import engine_of, golden, golden_path, run

from edgert.architectures import read_config, supported
from edgert.devices.base import rope_angles
from edgert.devices.cpu import CpuDevice
from edgert.devices.reference import ReferenceDevice
from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights


def metadata(name: str = "qwen3moe-f32") -> dict[str, Any]:
    """A fixture's metadata, to be changed."""
    with GgufFile.open(golden_path(name)) as file:
        return {key: file.metadata[key] for key in file.metadata}


def test_supported_architectures_are_found() -> None:
    assert supported() == [
        "bailingmoe2",
        "deepseek2",
        "dots1",
        "ernie4_5-moe",
        "glm4moe",
        "gpt-oss",
        "granitemoe",
        "hunyuan-moe",
        "lfm2moe",
        "llama",
        "llama4",
        "olmoe",
        "phimoe",
        "qwen2moe",
        "qwen35moe",
        "qwen3moe",
        "qwen3next",
    ]


@pytest.mark.parametrize(
    ("name", "key", "value", "kind", "message"),
    [
        ("qwen3moe-f32", "general.architecture", "gptj", UnsupportedError, "general.architecture is 'gptj'"),
        ("qwen3moe-f32", "qwen3moe.attention.sliding_window", 4096, UnsupportedError, "sliding_window = 4096"),
        ("qwen3moe-f32", "qwen3moe.a.new.key", 1, UnsupportedError, "qwen3moe.a.new.key = 1"),
        ("qwen3moe-f32", "qwen3moe.rope.scaling.type", "longrope", UnsupportedError, "'longrope'; supported are none"),
        ("qwen3moe-f32", "qwen3moe.expert_gating_func", 4, UnsupportedError, "expert_gating_func is 4"),
        ("qwen3moe-f32", "qwen3moe.expert_group_count", 3, ModelFileError, "a divisor of expert_count = 8"),
        ("olmoe-f32", "olmoe.expert_group_count", 99, ModelFileError, "expert_group_count is 99, not a divisor"),
        ("qwen3moe-f32", "qwen3moe.expert_used_count", 99, ModelFileError, "at most expert_count = 8"),
        ("qwen3moe-f32", "qwen3moe.block_count", 0, ModelFileError, "block_count is 0"),
        ("qwen3moe-f32", "qwen3moe.block_count", "many", ModelFileError, "block_count is 'many'"),
        ("qwen3moe-f32", "qwen3moe.attention.head_count_kv", 3, ModelFileError, "a divisor of attention.head_count"),
        ("qwen3moe-f32", "qwen3moe.rope.dimension_count", 34, ModelFileError, "an even number up to the head size 32"),
        ("qwen3moe-f32", "qwen3moe.attention.layer_norm_rms_epsilon", float("nan"), ModelFileError, "a finite number"),
        ("qwen3moe-f32", "qwen3moe.embedding_length", None, ModelFileError, "embedding_length is missing"),
        (
            "granitemoe-f32",
            "granitemoe.logit_scale",
            0.0,
            ModelFileError,
            "logit_scale is 0.0, not a number above zero",
        ),
        (
            "llama-f32",
            "llama.attention.head_count_kv",
            np.array([2, 1]),
            UnsupportedError,
            "llama.attention.head_count_kv differs between layers (1 to 2)",
        ),
        ("llama-f32", "llama.attention.head_count_kv", np.array([2.5, 2.5]), ModelFileError, "head_count_kv is array"),
        ("llama-f32", "llama.rope.dimension_count", 8, ModelFileError, "dimension_count is 8, not the head size 16"),
        ("llama-f32", "llama.rope.scaling.factor", -2.0, ModelFileError, "rope.scaling.factor is -2.0, not a number"),
        ("llama-f32", "llama.rope.scale_linear", -2.0, ModelFileError, "rope.scale_linear is -2.0, not a number"),
        (
            "llama-f32",
            "llama.attention.scale",
            -1.0,
            ModelFileError,
            "attention.scale is -1.0, not a number above zero",
        ),
        ("llama-f32", "llama.expert_weights_scale", 2.5, UnsupportedError, "expert_weights_scale = 2.5"),
        ("llama-f32", "llama.expert_shared_feed_forward_length", 8, UnsupportedError, "feed_forward_length = 8"),
        ("granitemoe-f32", "granitemoe.rope.scaling.finetuned", "no", ModelFileError, "'no', not true or false"),
    ],
)
def test_refusals_name_the_key_and_the_value(
    name: str, key: str, value: Any, kind: type[EdgertError], message: str
) -> None:
    changed = metadata(name)
    if value is None:
        del changed[key]
    else:
        changed[key] = value
    with pytest.raises(kind) as caught:
        read_config(changed, "some.gguf")
    assert message in str(caught.value) and str(caught.value).startswith("some.gguf") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama-f32", "attention.sliding_window", 0),
        ("llama-f32", "expert_group_count", 1),
        ("llama-f32", "expert_group_count", 0),
        ("llama-f32", "attention.head_count_kv", np.array([2, 2])),
        ("llama-f32", "attention.scale", 0.0),
        ("llama-f32", "rope.scaling.finetuned", False),
        ("llama-f32", "rope.scaling.factor", 0.0),
        ("llama-f32", "rope.scale_linear", 1.0),
        ("qwen3moe-f32", "expert_shared_feed_forward_length", 0),  # as Qwen3-Coder-30B-A3B has it
        ("qwen3moe-f32", "expert_weights_scale", 0.0),
        ("qwen3moe-f32", "expert_weights_scale", 1.0),
        ("granitemoe-f32", "rope.scaling.finetuned", True),
        ("granitemoe-f32", "expert_shared_feed_forward_length", 0),
    ],
)
def test_harmless_keys_are_let_through(name: str, key: str, value: Any) -> None:
    architecture = name.removesuffix("-f32")
    changed = metadata(name) | {f"{architecture}.{key}": value}
    assert read_config(changed, "some.gguf") == read_config(metadata(name), "some.gguf")


def test_multipliers_of_zero_are_none() -> None:
    zero = dict.fromkeys(["granitemoe.attention.scale", "granitemoe.residual_scale", "granitemoe.embedding_scale"], 0.0)
    config = read_config(metadata("granitemoe-f32") | zero, "some.gguf")
    assert (config.attention_scale, config.residual_scale, config.embedding_scale) == (0.25, 1.0, 1.0)


def test_the_old_name_of_the_linear_factor() -> None:
    old = {"llama.rope.scale_linear": 4.0}
    rope = read_config(metadata("llama-f32") | old, "some.gguf").rope
    assert (rope.scaling, rope.factor) == ("linear", 4.0)
    both = read_config(metadata("llama-f32") | old | {"llama.rope.scaling.factor": 2.0}, "some.gguf")
    assert both.rope.factor == 2.0


def test_expert_widths_that_older_files_leave_out() -> None:
    old = metadata("qwen2moe-f32")
    del old["qwen2moe.expert_feed_forward_length"], old["qwen2moe.expert_shared_feed_forward_length"]
    config = read_config(old, "some.gguf")
    assert (config.d_expert, config.d_shared) == (64 // 2, 64)
    old = metadata("qwen3moe-f32") | {"qwen3moe.expert_feed_forward_length": 0}
    assert read_config(old, "some.gguf").d_expert == 96 // 2
    del old["qwen3moe.feed_forward_length"]
    with pytest.raises(ModelFileError, match=r"qwen3moe\.feed_forward_length is missing"):
        read_config(old, "some.gguf")


@pytest.mark.parametrize("name", ["llama-f32", "olmoe-f32", "qwen2moe-f32", "qwen3moe-f32", "granitemoe-f32"])
def test_groups_of_experts_count_in_every_architecture(name: str, tmp_path: Path) -> None:
    """As in llama.cpp, whose routing reads the keys whatever the model is: experts come from the best group alone."""

    def keep_six(tensors: Tensors) -> None:
        for tensor in tensors:
            if "_exps" in tensor or "ffn_gate_inp.weight" in tensor:
                tensors[tensor] = tensors[tensor][:6]

    keys = {"expert_count": 6, "expert_used_count": 2, "expert_group_count": 2, "expert_group_used_count": 1}
    path = rewritten(name, tmp_path / "grouped.gguf", keep_six, **keys)
    tokens, chosen = golden(name)[1]["tokens"].tolist(), []
    engine, session = engine_of(path)
    engine.trace = lambda device: chosen.append(np.array(device.chosen(0)[0]))
    logits = run(engine, session, tokens)
    of_group = np.concatenate(chosen) // 3
    assert (of_group == of_group[:, :1]).all() and len(np.unique(of_group)) == 2
    assert (logits == run(*engine_of(path, device=ReferenceDevice), tokens)).all()


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_granite_without_rotation(tmp_path: Path, kv_type: str) -> None:
    """`rope.scaling.finetuned` false turns the rotation off there: exactly as the reference device computes it."""
    path = rewritten("granitemoe-f32", tmp_path / "still.gguf", rope__scaling__finetuned=False)
    tokens = golden("granitemoe-f32")[1]["tokens"].tolist()
    options = {"kv_type": kv_type, "activations": "f32"}
    engine, session = engine_of(path, device=CpuDevice, **options)
    assert engine.config.rope.n_rotated == 0
    logits = run(engine, session, tokens)
    assert (logits == run(*engine_of(path, device=ReferenceDevice, **options), tokens)).all()
    assert np.abs(logits - run(*engine_of(golden_path("granitemoe-f32"), **options), tokens)).max() > 0.01


def test_tensors_must_be_there_fit_and_be_known(tmp_path: Path) -> None:
    with GgufFile.open(golden_path("qwen2moe-f32")) as file:
        config = read_config(file.metadata, "some.gguf")
        name = "blk.1.ffn_up_exps.weight"
        info = file.tensors.pop(name)
        with pytest.raises(ModelFileError, match=f"{name} is missing"):
            Weights(file, config)
        file.tensors[name] = info
        Weights(file, config)
        file.tensors["blk.0.surprise.weight"] = info
        with pytest.raises(UnsupportedError, match=r"surprise\.weight"):
            Weights(file, config)
        del file.tensors["blk.0.surprise.weight"]
        file.tensors["output_norm.weight"] = info
        with pytest.raises(ModelFileError, match=r"output_norm.weight has shape .* ask for \(64,\)"):
            Weights(file, config)


def test_rotation_angles() -> None:
    """Plain, linear and YaRN frequencies against values worked out from the formulas."""
    base = metadata("qwen3moe-f32") | {"qwen3moe.rope.freq_base": 10000.0}
    plain = rope_angles(read_config(base, "m"), 8, None)
    assert plain.shape == (8, 16, 2)
    assert plain[3, 0, 0] == np.float32(np.cos(3.0)) and plain[5, 4, 1] == np.float32(np.sin(5 * 10000 ** (-0.25)))
    linear = rope_angles(read_config(base | {"qwen3moe.rope.scaling.factor": 4.0}, "m"), 8, None)
    assert linear[4, 0, 0] == np.float32(np.cos(1.0))
    halved = rope_angles(read_config(base, "m"), 8, np.full(16, 2.0, np.float32))
    assert (halved[6] == plain[3]).all()
    yarn = base | {
        "qwen3moe.rope.scaling.type": "yarn",
        "qwen3moe.rope.scaling.factor": 4.0,
        "qwen3moe.rope.scaling.original_context_length": 64,
    }
    angles = rope_angles(read_config(yarn, "m"), 8, None)
    magnitude = 1 + 0.1 * np.log(4.0)
    # 64 positions turn pair i by 64 * 10000**(-i/16) radians: more than 32 turns never, less than one from pair 5 on
    assert np.allclose(angles[4, 0], [np.cos(4.0) * magnitude, np.sin(4.0) * magnitude], rtol=1e-6)
    assert np.allclose(angles[4, 15, 1], np.sin(4 * 10000 ** (-15 / 16) / 4) * magnitude, rtol=1e-6)


def test_one_tensor_per_expert_is_named() -> None:
    with GgufFile.open(golden_path("llama-f32")) as file:
        config = read_config(file.metadata, "some.gguf")
        file.tensors["blk.0.ffn_gate.0.weight"] = file.tensors.pop("blk.0.ffn_gate_exps.weight")
        with pytest.raises(UnsupportedError, match="one tensor per expert"):
            Weights(file, config)
