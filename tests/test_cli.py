"""The command line over a model that is none: what it prints, where, and what of its options reaches the model."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from dataclasses import fields
from inspect import signature

import command_line
import fake_model
import pytest
from command_line import program
from rich.console import Console

from edgert.cli import inspect, options, output
from edgert.sampling import Sampling


@pytest.fixture
def model(monkeypatch):
    return command_line.fake(monkeypatch)


@pytest.fixture
def run(model, monkeypatch, capfd):
    return command_line.runner(monkeypatch, capfd)


def test_version_and_help_load_neither_numba_nor_the_editor():
    code = (
        "import sys; from edgert.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "heavy = {'numba', 'llvmlite', 'prompt_toolkit', 'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments, shown in ((["--help"], "inspect"), (["--version"], "edgert "), (["chat", "-h"], "-p")):
        process = program(*arguments, code=code)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        assert shown in out.decode()


def test_every_sampling_field_is_an_option_and_help_shows_its_default(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, text, _ = run("generate", "--help")
    assert code == 0
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│ --")}
    for field in fields(Sampling):
        line = lines["--" + field.name.replace("_", "-")]
        if isinstance(default := getattr(Sampling(), field.name), (int, float)):
            assert f"[default: {default}]" in line
    assert "the model's own" in run("chat", "--help")[1]


def test_help_tells_the_runtime_defaults_of_load(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "edgert.model")  # the true one
    from edgert.loading import DEFAULT_CONTEXT
    from edgert.model import load

    monkeypatch.setenv("COLUMNS", "200")
    text = run("chat", "--help")[1]
    defaults = {name: p.default for name, p in signature(load).parameters.items() if isinstance(p.default, str)}
    assert set(defaults) == {"kv_type", "activations", "device", "policy", "prefetch", "power"}
    for name, default in [*defaults.items(), ("context", f"at most {DEFAULT_CONTEXT},")]:
        (line,) = (line for line in text.splitlines() if "--" + name.replace("_", "-") in line)
        assert f"{default} if not set" in line


def test_generate_is_greedy_and_passes_only_what_was_set(run, model):
    assert run("generate", "m.gguf", "--prompt", "abc") == (0, "cba\n", "")
    assert model.loaded == {"path": "m.gguf"} and model.closed == 1
    assert model.calls == [{"prompt": "abc", "sampling": Sampling(), "max_tokens": None, "stop": ()}]


def test_options_reach_the_model(run, model):
    code, out, _ = run(
        "generate",
        "-p",
        "abcdef",
        "--temperature",
        "0.5",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
        "--min-p",
        "0.05",
        "--typical-p",
        "0.8",
        "--repetition-penalty",
        "1.2",
        "--repetition-window",
        "32",
        "--frequency-penalty",
        "0.1",
        "--presence-penalty",
        "-0.2",
        "--seed",
        "7",
        "--logit-bias",
        "5=-inf",
        "--logit-bias",
        "6=1.5",
        "--max-tokens",
        "4",
        "--stop",
        "c",
        "--stop",
        "x y",
        "--context",
        "512",
        "--threads",
        "2",
        "--memory",
        "900MiB",
        "--kv-type",
        "f32",
        "--activations",
        "f32",
        "--device",
        "cpu",
    )
    assert (code, out) == (0, "fed\n")
    assert model.loaded == {
        "path": None,
        "context": 512,
        "threads": 2,
        "memory": "900MiB",
        "kv_type": "f32",
        "activations": "f32",
        "device": "cpu",
    }
    sampling = Sampling(0.5, 40, 0.9, 0.05, 0.8, 1.2, 32, 0.1, -0.2, {5: -math.inf, 6: 1.5}, 7)
    assert model.calls == [{"prompt": "abcdef", "sampling": sampling, "max_tokens": 4, "stop": ["c", "x y"]}]


def test_echo_and_special(run, model):
    assert run("generate", "-p", "ab", "--echo")[1] == "abba\n"
    assert run("generate", "-p", "ab", "--special")[1] == ">ba<\n"
    assert json.loads(run("generate", "-p", "ab", "--echo", "--json")[1])["text"] == "abba"


def test_chat_takes_the_models_defaults_and_the_system_message(run, model):
    code, out, err = run("chat", "--prompt", "hi", "--system", "be brief", "--temperature", "0.2")
    assert (code, out, err) == (0, "You said: hi\n", "")
    call = model.calls[0]
    assert call["sampling"] == model.defaults.changed(temperature=0.2)
    assert call["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "piped", "asked"),
    [
        ((), "grüß dich\n", "grüß dich"),
        ((), "line\n\n", "line\n"),
        (("-p", "sum this up:"), "one\ntwo", "sum this up:\n\none\ntwo"),
        (("-p", "hi"), "", "hi"),
        ((), "\ufeffhi", "hi"),
    ],
)
def test_piped_text_is_the_prompt_or_follows_it(run, model, prompt, piped, asked):
    code, out, _ = run("chat", *prompt, piped=piped.encode())
    assert (code, out) == (0, f"You said: {asked}\n")


def test_json_is_one_document(run, model):
    code, out, _ = run("chat", "-p", "hé", "--json", "--stop", "hé")
    document = json.loads(out)
    assert code == 0
    assert document["model"] == "fake" and document["text"] == "You said: "
    assert (document["finish_reason"], document["stop"]) == ("stop", "hé")
    usage = document["usage"]
    assert usage["prompt_tokens"] == 19 and usage["generated_tokens"] == 12 and usage["bytes_read"] == 2048
    assert {"cached_tokens", "ttft_s", "tpot_s", "tokens_per_s", "expert_hits", "expert_misses"} < set(usage)
    assert usage["hit_rate"] == 0.75 and 0 < usage["flash_wait_share"] <= 1
    assert usage["flash_busy_s"] == 0.02 and usage["prefetch_useful"] == 1024 and usage["prefetch_evicted"] == 0


def test_a_models_text_is_never_markup_and_pipes_get_it_unchanged(run, model):
    text = "[bold]x[/bold] [/] :smile: \x1b[31m"
    code, out, err = run("chat", "-p", text)
    assert (code, out, err) == (0, f"You said: {text}\n", "")


def test_on_a_terminal_control_characters_are_made_harmless(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    output.write("a\x1b]0;title\x07\tb\x9b\r\n")
    assert screen.getvalue() == "a\ufffd]0;title\ufffd\tb\ufffd\ufffd\n"


def test_pieces_arrive_as_they_are_made():
    process = program("generate", "-p", "fedcba", DELAY_S="0.2")
    assert process.stdout.read(1) == b"a"
    started = time.monotonic()
    assert process.stdout.read(5) == b"bcdef"
    assert time.monotonic() - started > 0.6
    process.communicate(timeout=60)


def test_a_model_without_a_template_says_so(run, model):
    model.template.is_default = True
    code, out, err = run("chat", "-p", "hi")
    assert (code, out) == (0, "You said: hi\n") and "ChatML" in err and err.count("\n") == 1


def test_a_full_context_is_said(run, model):
    model.n_context = 23
    code, out, err = run("chat", "-p", "hi")
    assert (code, out) == (0, "You \n") and "23 tokens is full" in err and "--context" in err
    code, out, err = run("chat", "-p", "hi, how are you?")
    assert (code, out) == (2, "") and "the context 23" in err


def test_inspect_prints_every_value_in_human_units(run, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # a narrow pipe cuts nothing off
    code, out, err = run("inspect", "m.gguf")
    assert (code, err) == (0, "") and "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert ["architecture", "granitemoe"] in lines
    for row in (
        "parameters 134.5 million (134,515,008)",
        "total 123.3 MiB",
        "hot 80.0 MiB",
        "cold 3.00 GiB",
        "bytes each 60.8 KiB",
        "Q4_0 1.5 KiB",
        "F32 100 bytes",
        "bpw 4.531",
        "kv 3.0 KiB",
        "context 8,192",
        "size 49,152",
        "stop 2, 7",
        "supports tools no",
        "kv type f16",
        "working set 3.6 MiB",
        "residency 25.3%",
    ):
        assert row.split() in lines, row
    assert out.index("architecture") < out.index("experts") < out.index("memory")


def test_inspect_counts_memory_for_the_context_asked_for(run, model, monkeypatch):
    asked = []
    describe = sys.modules["edgert.describing"].describe
    monkeypatch.setattr(
        sys.modules["edgert.describing"], "describe", lambda p, **options: asked.append((p, options)) or describe(p)
    )
    run("inspect", "--context", "512")
    run("inspect")
    assert asked == [(None, {"context": 512, "memory": None}), (None, {"context": None, "memory": None})]


@pytest.mark.parametrize(
    ("arguments", "model_name", "memory"),
    [
        ("--memory", None, "auto"),
        ("--memory 2GiB", None, "2GiB"),
        ("m.gguf --memory", "m.gguf", "auto"),
        ("--memory m.gguf", "m.gguf", "auto"),
        ("--memory 50% m.gguf", "m.gguf", "50%"),
        ("m.gguf --memory --json", "m.gguf", "auto"),
        ("--memory=0.5 m.gguf", "m.gguf", "0.5"),
    ],
)
def test_inspect_plans_for_a_budget_with_or_without_a_size(run, model, monkeypatch, arguments, model_name, memory):
    asked = []
    describe = sys.modules["edgert.describing"].describe
    monkeypatch.setattr(
        sys.modules["edgert.describing"], "describe", lambda p, **options: asked.append((p, options)) or describe(p)
    )
    code, _, err = run("inspect", *arguments.split())
    assert (code, err) == (0, "")
    assert asked == [(model_name, {"context": None, "memory": memory})]


def test_inspect_as_json(run, model):
    assert json.loads(run("inspect", "m.gguf", "--json")[1]) == fake_model.DESCRIPTION


def test_inspect_makes_names_from_a_file_harmless(capsys):
    inspect.show({"name": "a\x1b[2Jb", "nothing": None, "none": [], "deep": {"deeper": {"bytes": 2048}}})
    out = capsys.readouterr().out
    assert "\x1b" not in out and "2.0 KiB" in out


def test_perplexity(run, model, tmp_path):
    text = tmp_path / "text"
    text.write_text("some words")
    code, out, err = run("perplexity", "m.gguf", "--file", str(text), "--chunks", "2")
    assert (code, out, err) == (0, "perplexity 26.061 +/- 1.234 (2 chunks of 512 tokens)\n", "")
    assert model.calls == [{"text": "some words", "chunk": 512, "n_chunks": 2}]
    document = json.loads(run("perplexity", "--file", str(text), "--chunk", "128", "--json")[1])
    assert document == {
        "model": "fake",
        "file": str(text),
        "chunk": 128,
        "value": 26.0612,
        "standard_error": 1.23449,
        "n_chunks": 2,
        "n_tokens": 1024,
    }


def test_sizes():
    shown = [output.binary_size(n) for n in (0, 1023, 1024, 129337952, 1 << 30, 5 << 40)]
    assert shown == ["0 bytes", "1,023 bytes", "1.0 KiB", "123.3 MiB", "1.00 GiB", "5,120.00 GiB"]


def test_a_bias_is_parsed():
    assert options.parse_bias(["1=2", "3=-inf", "4= -0.5"]) == {1: 2.0, 3: -math.inf, 4: -0.5}


def test_a_note_stands_on_a_line_of_its_own_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()

    def console(*, stderr: bool = False) -> Console:
        return Console(file=written, force_terminal=True, width=60, markup=False, color_system=None)

    monkeypatch.setattr(output, "console", console)
    with output.progress("working", live=False) as report:
        report("half of it", 0.5)
        output.note("what is done is kept")
        report("the rest", 0.9)
    output.note("and after it")
    before, _, after = written.getvalue().partition("what is done is kept")
    assert before.endswith("\r\x1b[2K") and after.startswith("\n") and "the rest" in after
    assert after.endswith("\r\x1b[1A\x1b[2Kand after it\n")
