"""The command line when something goes wrong: one line on stderr and an exit code, whatever fails or interrupts it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
from command_line import FAKE, program

from edgert.cli import main
from edgert.errors import EdgertError


@pytest.fixture
def model(monkeypatch):
    return command_line.fake(monkeypatch)


@pytest.fixture
def run(model, monkeypatch, capfd):
    return command_line.runner(monkeypatch, capfd)


def test_an_error_is_one_line_and_exit_code_2(run, model):
    code, out, err = run("chat", "absent.gguf", "-p", "hi")
    assert (code, out) == (2, "")
    assert err == "error: absent.gguf: there is no such file: give the path of a GGUF file\n"
    code, _, err = run("chat", "absent.gguf", "-p", "hi", "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("give the path of a GGUF file\n")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["chat", "-p", "x", "--top-p", "1.5"], "top_p=1.5"),
        (["generate", "-p", "x", "--temperature", "nan"], "temperature=nan"),
        (["generate", "-p", "x", "--logit-bias", "5:1"], "'5:1' is not ID=VALUE"),
        (["generate", "-p", "x", "--logit-bias", "5=inf"], "logit_bias[5]=inf"),
        (["generate", "-p", "x", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "-p", "x", "--stop", ""], "stop=''"),
        (["generate"], "--prompt"),
        (["chat", "", "-p", "x"], "the model name is empty"),
        (["inspect", ""], "the model name is empty"),
        (["chat"], "--prompt"),
        (["chat", "--prompt", ""], "--prompt"),
        (["perplexity", "--file", "/no/such/text"], "/no/such/text cannot be read"),
        (["perplexity", "--file", "/"], "/ cannot be read"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, model, arguments, shown):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and shown in err


def test_bad_sampling_options_are_refused_before_a_model_is_loaded(run, model):
    run("chat", "-p", "x", "--top-p", "1.5")
    assert model.loaded == {}


def test_usage_errors_exit_with_2(run):
    assert run("chat", "--no-such-option")[0] == 2
    assert run("no-such-command")[0] == 2
    assert run("perplexity")[0] == 2
    assert run("generate", "--seed", "many")[0] == 2


def test_text_that_is_not_utf_8_is_refused(run, tmp_path):
    code, _, err = run("chat", piped=b"ab\xff")
    assert code == 2 and "the text piped in is not UTF-8 at byte 2" in err
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    code, _, err = run("perplexity", "--file", str(tmp_path / "latin"))
    assert code == 2 and "latin is not UTF-8 at byte 0" in err


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 2),
        (EdgertError("x"), 2),
    ],
)
def test_what_goes_wrong_within_an_answer(run, model, monkeypatch, problem, code):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(model, "chat", fail)
    left, out, err = run("chat", "-p", "hi")
    assert (left, out) == (code, "") and "Traceback" not in err
    assert err.startswith("error: ") if code == 2 else err == ""
    assert model.closed == 1


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (OSError(2, "Gone", "x.gguf"), "error: x.gguf: Gone\n"),
        (SystemError("no room"), "error: SystemError: no room\n"),
        (ImportError("libx.so: failed to map segment"), "error: ImportError: libx.so: failed to map segment\n"),
    ],
)
def test_failures_of_the_system_are_one_line(run, model, monkeypatch, problem, shown):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(model, "chat", fail)
    assert run("chat", "-p", "hi") == (2, "", shown)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", ["chat -p hi", "chat -p hi --json", "inspect", "--help", "--version"])
def test_a_full_disk_is_one_line(arguments):
    command = f"{shlex.join([sys.executable, str(FAKE)])} {arguments} >/dev/full"
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


@pytest.mark.parametrize(
    ("closed", "code", "out", "err"),
    [("2>&-", 0, b"You said: hi\n", b""), (">&-", 2, b"", b"error: stdout is closed: there is nowhere to write to\n")],
)
def test_closed_streams(closed, code, out, err):
    command = f"{shlex.join([sys.executable, str(FAKE)])} chat -p hi {closed}"
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_ctrl_c_while_a_model_is_loaded_waits_for_a_safe_place(run, model, monkeypatch):
    seen = []

    def load(path, *, progress, **_):
        progress("compiling kernels", 0.9)
        signal.raise_signal(signal.SIGINT)
        progress("compiling more kernels", 0.95)
        seen.append("compiled")
        return model

    monkeypatch.setattr(sys.modules["edgert.model"], "load", load)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    assert run("chat", "-p", "hi") == (130, "", "")
    assert seen == ["compiled"] and model.closed == 1 and model.calls == []

    def stopped(path, *, progress, **_):
        signal.raise_signal(signal.SIGINT)
        seen.append("loaded")
        progress("loading weights", 0.5)

    monkeypatch.setattr(sys.modules["edgert.model"], "load", stopped)
    assert run("chat", "-p", "hi")[0] == 130
    assert seen == ["compiled", "loaded"]


def test_a_second_ctrl_c_while_loading_leaves_at_once():
    code = (
        "import signal, time; from edgert.cli.interrupts import while_loading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with while_loading(print): signal.raise_signal(2); signal.raise_signal(2); print('still here', flush=True)"
    )
    process = program(code=code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_among_the_imports_is_quiet(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 130
    code = "import sys, edgert.cli.main; assert not {'typer', 'numpy', 'rich'} & set(sys.modules)"
    assert program(code=code).communicate(timeout=60) == (b"", b"")  # so they are imported within main


def test_a_closed_pipe_is_quiet():
    process = program("generate", "-p", "x" * 1000, DELAY_S="0.001")
    assert process.stdout.read(10) == b"x" * 10
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_a_script_with_130():
    code = (  # nohup and background jobs of scripts hand an ignored SIGINT down
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"runpy.run_path({str(FAKE)!r}, run_name='__main__')"
    )
    process = program("generate", "-p", "x" * 1000, code=code, DELAY_S="0.05")
    assert process.stdout.read(1) == b"x"
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
