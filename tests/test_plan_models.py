"""Models on paper: presets, headers cut short and config.json alone are as large as whole files, and are inspected."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_models import decoded, write_gguf
from models import golden_path
from typer.testing import CliRunner

from edgert.cli.app import app
from edgert.describing import describe
from edgert.errors import ModelFileError, OptionError
from edgert.loading import resolve
from edgert.memory import STARTING_BYTES
from edgert.plan_model import PlanModel, open_plan_model
from edgert.preset_keys import KEY_PRESETS
from edgert.presets import PRESETS
from edgert.storage.gguf_file import GgufFile

BILLIONS = {  # as their makers count them
    "qwen3-30b-a3b": 30.5,
    "qwen3-coder-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "olmoe-1b-7b": 6.92,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "granite-3.1-1b-a400m": 1.33,
    "granite-3.1-3b-a800m": 3.3,
    "llama-2-7b": 6.74,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_model(name: str) -> None:
    assert open_plan_model(name).n_parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("qwen3-30b-a3b", 18.56), ("qwen3-30b-a3b:q8_0", 32.48), ("olmoe-1b-7b", 4.21), ("mixtral-8x7b:Q4_0", 26.4)],
)
def test_a_preset_is_as_large_as_the_published_file(name: str, gigabytes: float) -> None:
    assert open_plan_model(name).file_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's header, and little of what follows."""
    whole = resolve(None)
    with GgufFile.open(whole) as file:
        start = min(tensor.offset for tensor in file.tensors.values())
    path = tmp_path_factory.mktemp("cut") / "head.gguf"
    path.write_bytes(whole.read_bytes()[: start + 100])
    return path


def test_the_first_megabytes_tell_what_the_whole_file_tells(header: Path) -> None:
    cut, whole = open_plan_model(str(header)), open_plan_model(None)
    assert header.stat().st_size < 4 << 20
    assert (cut.n_parameters, cut.file_bytes) == (whole.n_parameters, whole.file_bytes)
    assert cut.needs(4096, "f16", 2) == whole.needs(4096, "f16", 2)


def test_a_header_that_is_cut_is_said_to_be_so(header: Path, tmp_path: Path) -> None:
    raw = header.read_bytes()
    for n_bytes in (30, 1000, len(raw) // 2, len(raw) - 5000):
        path = tmp_path / f"{n_bytes}.gguf"
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(ModelFileError, match=r"header goes on behind these .* take more"):
            open_plan_model(str(path))


def test_what_is_not_a_plan_still_wants_the_whole_file(header: Path) -> None:
    with pytest.raises(ModelFileError, match="truncated"):
        GgufFile.open(header)


def test_a_config_json_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["olmoe-1b-7b"]))
    preset = open_plan_model("olmoe-1b-7b:q8_0")
    for name in (f"{tmp_path}/config.json:q8_0", f"{tmp_path}:q8_0"):
        assert open_plan_model(name).file_bytes == preset.file_bytes
    assert open_plan_model(str(tmp_path)).file_bytes == open_plan_model("olmoe-1b-7b").file_bytes


GPT_OSS = {  # as openai/gpt-oss-20b has it
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.mark.parametrize("quantisation", ["q4_k_m", "q8_0"])
def test_a_config_json_says_that_experts_stay_in_mxfp4(quantisation: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT_OSS))
    found, preset = open_plan_model(f"{path}:{quantisation}"), open_plan_model(f"gpt-oss-20b:{quantisation}")
    assert found.weights.file.tensors == preset.weights.file.tensors
    assert (found.record_bytes == preset.record_bytes).all() and found.record_bytes.sum() < 11 << 30
    path.write_text(json.dumps({key: value for key, value in GPT_OSS.items() if key != "quantization_config"}))
    floats = open_plan_model(f"{path}:{quantisation}")  # widened by whoever saved it: quantised as anything else
    assert {floats.weights.file.tensors[f"blk.0.ffn_{part}_exps.weight"].type.name for part in ("gate", "down")} <= (
        {"Q5_0", "Q8_0"} if quantisation == "q4_k_m" else {"Q8_0"}
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3-30b-a3", "did you mean qwen3-30b-a3b"),
        ("qwen3-coder-30b", "did you mean qwen3-coder-30b-a3b"),
        ("nothing", "neither a file nor a preset"),
        ("qwen3-30b-a3b:q9", "no quantisation"),
        ("qwen3-30b-a3b:", "no quantisation"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_plan_model(name)


def test_a_model_is_planned_from_its_tables_alone() -> None:
    model = open_plan_model("qwen3-30b-a3b")
    assert isinstance(model, PlanModel)
    with pytest.raises(ModelFileError, match="on paper"):
        model.weights.embed([1])


# ---- edgert inspect --------------------------------------------------------------------------------------------------
def inspected(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["inspect", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("more", [None, 0, 100])
def test_a_header_is_inspected_as_the_whole_file_is(
    header: Path, more: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs, and what goes where in a budget: the smallest one and a larger one."""
    monkeypatch.setattr("edgert.memory.taken", lambda: 0)  # by pytest and the tests before
    floor = max(describe(context=1024)["memory"]["floor"], STARTING_BYTES)
    memory = () if more is None else ("--memory", f"{-(-floor // (1 << 20)) + more}MiB")
    cut, whole = (inspected(*model, *memory, "--context", "1024") for model in ((str(header),), ()))
    n_bytes = Path(whole.pop("path")).stat().st_size
    assert cut.pop("path") == str(header)
    assert cut.pop("source") == f"the first {header.stat().st_size:,} of {n_bytes:,} bytes: it cannot run"
    assert cut == whole and cut["memory"]["floor"] > cut["memory"]["hot"] and cut["template"]["source"] == "model"


def test_a_split_model_is_cut_where_one_part_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=20))
    metadata, weights = decoded(golden_path("olmoe-f32"))
    write_gguf(tmp_path / "m.gguf", metadata, weights, "F32")
    first, *_, last = sorted(tmp_path.glob("*.gguf"))
    whole = describe(first)
    assert "source" not in whole and whole["bytes"]["total"] == sum(
        path.stat().st_size for path in first.parent.iterdir()
    )
    last.write_bytes(last.read_bytes()[:-1000])
    cut, missing = describe(first), whole["bytes"]["total"] - 1000
    assert cut["source"].startswith(f"the first {missing:,} of ")
    assert 0 <= whole["bytes"]["total"] - cut["bytes"]["total"] < 1000, "but what pads the last tensor of each part"
    assert {**cut, "bytes": whole["bytes"], "source": ""} == {**whole, "source": ""}


@pytest.mark.parametrize("name", [*PRESETS, *KEY_PRESETS])
def test_a_preset_is_inspected(name: str) -> None:
    """Sizes, and a smallest budget that is enough, one MiB less being refused."""
    found, model = describe(name, context=2048), open_plan_model(name)
    assert found["source"] == "preset, as Q4_K_M on paper: no weights, it cannot run" and "path" not in found
    assert (found["name"], found["architecture"]) == (model.name, model.config.architecture)
    assert (found["parameters"], found["bytes"]["total"]) == (model.n_parameters, model.file_bytes)
    assert found["bytes"]["hot"] + found["bytes"]["cold"] == found["bytes"]["total"]
    memory, needed = found["memory"], model.needs(2048, "f16")
    assert memory["floor"] == needed.least_budget and memory["working_set"] == needed.working_set
    assert memory["total"] == needed.plan(512).total and found["vocabulary"] == {"size": model.config.n_vocab}
    assert "tokenizer" not in found and "template" not in found
    assert (found["experts"] is None) == (model.config.router is None)


def test_what_inspect_shows_of_a_preset() -> None:
    for columns in ("80", "120"):
        result = CliRunner().invoke(app, ["inspect", "gpt-oss-20b"], env={"COLUMNS": columns})
        lines = [line.split() for line in result.stdout.splitlines()]
        for row in ("parameters 20,914.8 million (20,914,757,184)", "used 4", "working set 1.18 GiB", "context 4,096"):
            assert row.split() in lines, row
        assert (
            any(line[:2] == ["smallest", "budget"] for line in lines) and max(map(len, result.stdout.splitlines())) < 80
        )


def test_a_config_json_is_inspected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    for name in (f"{tmp_path}", f"{tmp_path}/config.json"):
        found = inspected(name)
        assert found["source"].startswith(f"{tmp_path}/config.json, as Q4_K_M on paper: ")
        assert found["memory"] == inspected("gpt-oss-20b")["memory"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpt-oss-20",), "'gpt-oss-20' is neither a file nor a preset; did you mean gpt-oss-20b?"),
        (("absent.gguf",), "absent.gguf: no such file"),
        (("absent.edge",), "absent.edge: no such file"),
        (("gpt-oss-20b:q9",), "'q9' is no quantisation"),
        (("gpt-oss-20b", "--memory", "900MiB"), "below this model's floor of 1,"),
        (("gpt-oss-20b", "--context", "999999"), "must lie between 1 and 131072"),
    ],
)
def test_what_cannot_be_inspected(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and words in result.stderr, result.output
