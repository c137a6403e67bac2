"""Calibration text that a model writes itself: answers to prompts of several kinds, drawn at temperature 1.

Each chunk has its own seed and its own prompts, so it is the same whatever was written before, or by which process.
Some prompts are for the chunks alone that are kept back for proofs.
"""

from __future__ import annotations

from collections.abc import Callable

from edgert.engine import Engine, Session
from edgert.loading import Parts
from edgert.sampling import Sampler, Sampling

# What a model is asked, where it has a chat template; else it goes on from the text behind the stroke
_PROMPTS = (
    ("Tell me a short story about a lighthouse keeper.", "The lighthouse keeper had not seen a ship for"),
    ("Write a Python function that merges two sorted lists, and explain it.", "def merge(left, right):\n"),
    ("How does photosynthesis work?", "Photosynthesis is the process by which"),
    ("Write an e-mail that moves a meeting to Thursday.", "Dear all,\n\nthe meeting that was planned for"),
    ("What were the causes of the First World War?", "The First World War began in"),
    ("A train goes 180 km in 2.5 hours. How fast is it? Show your steps.", "Question: A train goes 180 km in"),
    ("Give me a recipe for a vegetable soup.", "Ingredients:\n- 2 carrots\n"),
    ("Write an HTML page with a form that asks for name and age.", "<!DOCTYPE html>\n<html>\n"),
    ("Summarise how a bill becomes a law.", "The legislative process"),
    ("Translate into French: The weather is nice today.", "English: Where is the station?\nFrench:"),
    ("What is the difference between TCP and UDP?", "In computer networking,"),
    ("Answer as JSON with the keys name, capital, population: Japan.", '{"name": "Japan", "capital":'),
    ("Plan a weekend in a small town by the sea.", "Saturday morning:"),
    ("Explain what a p-value is to a nurse.", "In statistics, a p-value"),
    ("Write a review of a restaurant you liked.", "We went there on a Friday evening and"),
    ("Write a C function that reverses a string in place.", "#include <stdio.h>\n\nvoid reverse(char *s)"),
    ("List ten animals and where they live.", "1. Penguin:"),
    ("Let us talk. What did you find interesting lately?", "- So, what have you been up to?\n-"),
    ("Describe the parts of the human heart.", "The heart has four"),
    ("Write a SQL query for the ten best customers of a shop.", "SELECT customer_id, SUM("),
    ("Why is the sky blue?", "The sky is blue because"),
    ("Write a poem about the first snow.", "The first snow\n"),
    ("How do I fix a flat bicycle tyre?", "To repair a puncture, first"),
    ("What should a tenant look for in a contract?", "This agreement is made between"),
)
_KEPT_BACK = _PROMPTS[1::4]
_CALIBRATED = tuple(prompt for prompt in _PROMPTS if prompt not in _KEPT_BACK)
_STRIDE = 7  # prompts between the first ones of two chunks
_KEPT_BACK_SEED = 1 << 20  # added to the number of a chunk


def write_chunk(
    parts: Parts, number: int, chunk: int, written: Callable[[int], None], *, held_out: bool = False
) -> list[int]:
    """The chunk of that number, to calibrate on or to keep back: `chunk` token ids. written(1): a token more is drawn.

    The session holds them, but for the last, afterwards.
    """
    engine, session, tokenizer = parts.engine, parts.session, parts.tokenizer
    sampler = Sampler(Sampling(temperature=1.0, seed=number + held_out * _KEPT_BACK_SEED))
    session.tokens.clear()
    tokens: list[int] = []
    prompts, prompt = _KEPT_BACK if held_out else _CALIBRATED, number * _STRIDE
    while len(tokens) < chunk:
        asked = _prompt(parts, *prompts[prompt % len(prompts)])[: chunk - len(tokens)]
        prompt += 1
        tokens += asked
        written(len(asked))
        n_rows = _run(engine, session, asked)
        while len(tokens) < chunk:
            token = sampler.choose(engine.last_logits(n_rows), tokens)
            tokens.append(token)
            written(1)
            if len(tokens) < chunk:
                n_rows = _run(engine, session, [token])
            if token in tokenizer.stop_ids:
                break
    return tokens


def _run(engine: Engine, session: Session, tokens: list[int]) -> int:
    """Rows of the last step of these tokens."""
    return list(engine.prefill(tokens, session))[-1]


def _prompt(parts: Parts, question: str, start: str) -> list[int]:
    if parts.template.is_default:
        return parts.tokenizer.encode(start)
    return parts.template.encode([{"role": "user", "content": question}])
