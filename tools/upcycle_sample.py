"""The dense model's own answers, sampled with torch in batches: chat data for sparse upcycling.

Training on them keeps the upcycled model's manner of answering where the rest of the data has another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from upcycle_data import Conversation, Encoder, Source
from upcycle_model import Cache, DenseModel

TEMPERATURE = 0.8
MAX_QUESTION = 160  # tokens; longer ones are passed over
MAX_ANSWER = 192  # tokens; answers that do not end within them are thrown away
BATCH = 64


def self_samples(
    model: DenseModel,
    encoder: Encoder,
    questions: Sequence[str],
    n: int,
    seed: int,
    report: Callable[[str], None],
) -> Source:
    """Conversations: `n` questions, taken in turn and again from the first, answered by `model`."""
    usable = [(text, ids) for text in questions if len(ids := encoder.prompt(text)) <= MAX_QUESTION]
    wanted = [usable[i % len(usable)] for i in range(n)] if usable else []
    random = torch.Generator(model.device).manual_seed(seed)
    talks: list[Conversation] = []
    for first in range(0, len(wanted), BATCH):
        group = wanted[first : first + BATCH]
        answers = answer(model, [ids for _, ids in group], encoder.tokenizer.stop_ids, random)
        for (question, _), ids in zip(group, answers, strict=True):
            if ids and (reply := encoder.tokenizer.decode(ids).strip()):
                talks.append([{"role": "user", "content": question}, {"role": "assistant", "content": reply}])
        report(f"sampled {first + len(group)} of {len(wanted)} answers, kept {len(talks)}")
    return Source("self-samples", talks, 0)


@torch.no_grad()
def answer(
    model: DenseModel, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], random: torch.Generator
) -> list[list[int]]:
    """One sampled continuation of each prompt, without its stop token; empty where it did not stop in time.

    Prompts are padded on the left: `start` is where each one's text begins in its row.
    """
    width = max(map(len, prompts))
    start = torch.tensor([width - len(prompt) for prompt in prompts], device=model.device)[:, None]
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    new = torch.tensor(rows, device=model.device)  # (batch, n_new)
    stops = torch.tensor(sorted(stop_ids), device=model.device)
    cache: Cache = []
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    for n_past in [0, *range(width, width + MAX_ANSWER - 1)]:
        place = torch.arange(n_past, n_past + new.shape[1], device=model.device)[None]
        logits = model.step(new, (place - start).clamp(min=0), _visible(place, start), cache)
        new = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=random)
        stopped |= torch.isin(new[:, 0], stops)
        for row in (~stopped).nonzero()[:, 0].tolist():
            answers[row].append(int(new[row, 0]))
        if stopped.all():
            break
    return [ids if ended else [] for ids, ended in zip(answers, stopped.tolist(), strict=True)]


def _visible(place: Tensor, start: Tensor) -> Tensor:
    """What tokens at `place` (1, n_new) see: the text before them and themselves; (batch, 1, n_new, n_all).

    A padding token sees itself too: seeing nothing gives NaN, and NaN spreads through the cache.
    """
    query, key = place[0, :, None], torch.arange(int(place[0, -1]) + 1, device=place.device)[None, :]
    in_text = key[None] >= start[:, :, None]  # (batch, 1, n_all)
    return ((key <= query) & in_text | (key == query))[:, None]
