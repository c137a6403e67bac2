"""tools/bench_peer.py against a llama-bench that is a few lines of Python."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import golden_path

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import bench_peer  # noqa: E402   # found through the line above

from edgert import bench, bench_runner  # noqa: E402

# Fastest for prompts with mmap and flash attention, for generation without both; at a depth, flash attention pays.
FAKE = """#!{python}
import json, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
options = dict(zip(words[::2], words[1::2]))
p, n, d, r = (int(options[name]) for name in ("-p", "-n", "-d", "-r"))
if options["--repack"] == "0" and {refuses}:
    print("invalid parameter for argument: --repack", file=sys.stderr)
    sys.exit(1)
rate = 100.0 + 5 * (options["--repack"] == "1")
if p:
    rate += 10 * (options["-lm"] == "mmap") + 10 * (options["-fa"] == "on")
else:
    rate += 10 * (options["-lm"] == "none") + 10 * ((options["-fa"] == "on") == (d > 0))
print(json.dumps([{{"n_prompt": p, "n_gen": n, "n_depth": d, "n_threads": int(options["-t"]), "avg_ts": rate,
    "samples_ts": [rate + i for i in range(r)]}}]))
"""


class Steady:
    """Stands in for edgert: 230 tokens a second."""

    def rates(self, test: bench_runner.Test, repetitions: int) -> list[float]:
        return [230.0] * repetitions


def make_peer(tmp_path: Path, *, refuses: bool = False) -> bench_peer.Peer:
    program = tmp_path / "llama-bench"
    program.write_text(FAKE.format(python=sys.executable, log=str(tmp_path / "log"), refuses=refuses))
    program.chmod(0o755)
    return bench_peer.Peer(program, Path("a model.gguf"), threads=3)


def test_a_run_passes_all_that_decides_and_reads_the_samples(tmp_path: Path) -> None:
    peer = make_peer(tmp_path)
    settings = bench_peer.Settings("none", "off", "1")
    assert peer.rates(bench_runner.Test("generate", 64, 4096), settings, 3) == [115.0, 116.0, 117.0]
    expected = "-m a model.gguf -p 0 -n 64 -d 4096 -t 3 -r 3 -lm none -fa off --repack 1 -o json\n"
    assert (tmp_path / "log").read_text() == expected


def test_the_best_settings_are_found_for_each_kind_and_depth(tmp_path: Path) -> None:
    peer = make_peer(tmp_path)
    best = peer.best_settings(bench.tests_of([512, 128], [64], [0, 4096]))
    assert best == {
        ("prompt", 0): bench_peer.Settings("mmap", "on", "1"),
        ("prompt", 4096): bench_peer.Settings("mmap", "on", "1"),
        ("generate", 0): bench_peer.Settings("none", "off", "1"),
        ("generate", 4096): bench_peer.Settings("none", "on", "1"),
    }
    runs = (tmp_path / "log").read_text().splitlines()
    assert len(runs) == 2 * (8 + 4 + 2) + 2 * 2 and all("-p 128" in run or "-n 16" in run for run in runs)


def test_settings_that_are_given_are_not_searched(tmp_path: Path) -> None:
    options = bench_peer.read_options(["m.gguf", "--against", "llama-bench", "--settings", "mmap,on,1"])
    peer = replace(make_peer(tmp_path), settings=options.settings)
    given = bench_peer.Settings("mmap", "on", "1")
    assert peer.best_settings(bench.tests_of([8], [2], [0])) == {("prompt", 0): given, ("generate", 0): given}
    assert not (tmp_path / "log").exists()


def test_settings_that_do_not_run_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = make_peer(tmp_path, refuses=True).best_settings([bench_runner.Test("prompt", 8)])
    assert best["prompt", 0] == bench_peer.Settings("mmap", "on", "1")
    assert "--repack 0 does not run" in capsys.readouterr().out


def test_pairs_alternate_and_their_ratios_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made,) = bench_peer.compare(Steady(), make_peer(tmp_path), [bench_runner.Test("generate", 64)], 3, 2)  # type: ignore[arg-type]
    assert made.theirs == [125.5] * 3 and made.ratios == [230 / 125.5] * 3
    assert made.as_json()["median_ratio"] == 230 / 125.5
    assert made.as_json()["peer_settings"] == {"load_mode": "none", "flash_attention": "off", "repack": "1"}
    said = capsys.readouterr().out
    assert "tg64: pair 3 of 3: edgert 230.0, peer 125.5 tok/s, ratio 1.83" in said
    assert "tg64: median ratio 1.83" in said


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "error: unable to load model",
        "[]",
        "{}",
        "[1]",
        '[{"n_prompt": 8}]',
        '[{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "samples_ts": []}]',
        '[{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "samples_ts": ["a"]}]',
        '[{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "samples_ts": [0.0]}]',
        '[{"n_prompt": 9, "n_gen": 0, "n_depth": 0, "samples_ts": [1.0]}]',
    ],
)
def test_what_is_no_result_is_refused(printed: str) -> None:
    with pytest.raises(bench_peer.PeerError, match="llama-bench printed"):
        bench_peer.parse(printed, bench_runner.Test("prompt", 8))


def test_a_missing_or_failing_peer_is_one_error(tmp_path: Path) -> None:
    test, settings = bench_runner.Test("prompt", 8), bench_peer.ALL[0]
    with pytest.raises(bench_peer.PeerError, match="No such file"):
        bench_peer.Peer(tmp_path / "absent", Path("m"), 2).rates(test, settings, 1)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho failed to load >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(bench_peer.PeerError, match="ended with 3: failed to load"):
        bench_peer.Peer(failing, Path("m"), 2).rates(test, settings, 1)
    with pytest.raises(bench_peer.PeerError, match="no setting runs"):
        bench_peer.Peer(failing, Path("m"), 2).best_settings([test])


def test_the_tool_compares_and_ends_with_json(tmp_path: Path) -> None:
    peer, model = make_peer(tmp_path), golden_path("olmoe-q4_0")
    sizes = ["--prompt", "6", "--generate", "2", "--depth", "0,3", "--pairs", "2", "--repetitions", "1"]
    command = [sys.executable, str(TOOLS / "bench_peer.py"), str(model), "--against", str(peer.program), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert [test["test"] for test in document["tests"]] == ["pp6", "tg2", "pp6 @ d3", "tg2 @ d3"]
    for test in document["tests"]:
        assert len(test["ratios"]) == document["pairs"] == 2 and min(test["edgert_tokens_per_s"]) > 0
    failed = subprocess.run([*command[:2], "absent.gguf", *command[3:]], capture_output=True, text=True)
    assert failed.returncode == 2 and "error: edgert: ModelFileError: absent.gguf" in failed.stderr
