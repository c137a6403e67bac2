"""What a job is given of an expert: its inputs as the expert takes them, what its output counts, and its biases."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from models import golden_path

from edgert.architectures import read_config
from edgert.expert_jobs import jobs_of
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights


class Rows:
    """States of an expert, see edgert.states: inputs, the router's weights, and what each token counts."""

    def of(self, layer: int, expert: int) -> tuple[Any, Any, Any]:
        return np.full((3, 64), 2.0, np.float32), np.float32([0.5, 0.25, 1.0]), np.float32([1.0, 1.0, 4.0])


@pytest.mark.parametrize(("name", "scaled"), [("llama4-f32", True), ("dots1-f32", False)])
def test_quantisers_see_what_an_expert_takes(name: str, scaled: bool) -> None:
    """Where a router's weights multiply the inputs, they do not multiply the output too; a domain's share always counts."""
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
