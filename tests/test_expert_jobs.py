"""What a job is given of an expert: its inputs as the expert takes them, what its output counts, and its biases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from models import golden_path
from profiling_runs import CHUNK, run, silent, write_text

from edgert.architectures import read_config
from edgert.expert_jobs import jobs_of
from edgert.model import load
from edgert.quantising import profile_counts, trial_chunks, weights_of
from edgert.states import States, collect_states
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights


class Rows:
    """States of an expert, see edgert.states: inputs, the router's weights, and what each token counts."""

    def of(self, layer: int, expert: int) -> tuple[Any, Any, Any]:
        return np.full((3, 64), 2.0, np.float32), np.float32([0.5, 0.25, 1.0]), np.float32([1.0, 1.0, 4.0])


@pytest.mark.parametrize(("name", "scaled"), [("llama4-f32", True), ("dots1-f32", False)])
def test_quantisers_see_what_an_expert_takes(name: str, scaled: bool) -> None:
    """Where a router's weights multiply the inputs, they do not multiply the output too; a domain's share does."""
    with GgufFile.open(golden_path(name)) as file:
        weights = Weights(file, read_config(file.metadata, "m"))
        job = next(jobs_of(weights, cast(Any, Rows()), iter([(1, 0, ("int8",))]), "gptq"))
    shares = [0.5, 0.25, 1.0]
    assert job.rows[:, 0].tolist() == [2 * share if scaled else 2.0 for share in shares]
    assert job.importance.tolist() == ([1.0, 1.0, 2.0] if scaled else [0.5, 0.25, 2.0])


def test_quantisers_know_the_biases_of_experts() -> None:
    path = golden_path("gpt-oss-f32")
    with GgufFile.open(path) as file:
        weights = Weights(file, read_config(file.metadata, "m"))
        jobs = list(jobs_of(weights, cast(Any, Rows()), iter([(1, e, ("int8",)) for e in (0, 2)]), "gptq"))
        stored = [file.read(f"blk.1.ffn_{part}_exps.bias").view(np.float32) for part in ("gate", "up")]
    for job, e in zip(jobs, (0, 2), strict=True):
        assert job.activation == "swiglu-oss" and job.biases is not None
        for found, bias in zip(job.biases, stored, strict=True):
            assert np.array_equal(found, bias.reshape(-1, len(found))[e])


def test_what_experts_were_given_counts_by_the_shares_of_its_domains(tmp_path: Path) -> None:
    model = golden_path("qwen3moe-q4_0")
    texts = [write_text(tmp_path / "one.txt"), write_text(tmp_path / "two.txt", seed=1)]
    profile, path = run(model, tmp_path / "p.npz", texts).profile, tmp_path / "s.bin"
    first, second = (domain.name for domain in profile.domains)
    busiest = int(profile.frequency()[1].argmax())
    with load(model, context=CHUNK, threads=1) as opened:
        states = collect_states(opened, profile, None, path, silent)
        uneven, alone = (
            States(replace(profile, shares=shares), states.layers, path)
            for shares in ({first: 0.25, second: 0.75}, {first: 1.0, second: 0.0})
        )
        wanted = [(1, busiest, ("int2",))]
        (plain,), (counted,) = (jobs_of(weights_of(opened), one, iter(wanted), "rtn") for one in (states, uneven))
    tokens, _ = states.tokens(1, busiest)
    of_first = tokens < len(profile.domains[0].tokens)
    assert 0 < of_first.sum() < len(tokens)
    np.testing.assert_allclose(uneven.of(1, busiest)[2], np.where(of_first, 0.5, 1.5), rtol=1e-6)
    assert np.array_equal(alone.tokens(1, busiest)[0], tokens[of_first])
    np.testing.assert_allclose(counted.importance**2, plain.importance**2 * uneven.of(1, busiest)[2], rtol=1e-5)
    routed = profile_counts(replace(profile, shares=alone.profile.shares))
    assert routed[1, busiest] == of_first.sum()
    for n_chunks, shares in ((4, (1, 3)), (2, (1, 1)), (1, (1, 1))):
        chunks = trial_chunks(uneven.profile, n_chunks)
        own = [domain.tokens.reshape(-1, CHUNK).tolist() for domain in profile.domains]
        assert tuple(sum(chunk in part for chunk in chunks) for part in own) == shares
    assert len(trial_chunks(alone.profile, 3)) == 3
