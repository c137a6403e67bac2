"""How often a model answers with valid JSON when it is asked for an object: what low bits break before prose suffers.

The answer is begun with "{" for the model, so that the rate is about structure and not about habits of wording, and
models that were never taught to chat can be tried too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.model import Model

PROMPTS = (
    "Give the name, age and city of a person you make up, as a JSON object with the keys name, age and city.",
    "Describe a book as a JSON object with the keys title, author, year and genres; genres is a list of strings.",
    "Reply with a JSON object only: the capital and the population of France, keys capital and population.",
    "Turn this order into JSON with the keys item, quantity and price: three boxes of tea at 4.50 each.",
    'Write a JSON object with the key "colours" that holds a list of five colours.',
    "As JSON: a weather report with the keys place, temperature, unit and rainy (true or false).",
    "Extract from the sentence 'Anna meets Ben in Oslo on Monday' a JSON object with the keys people, place and day.",
    'Give a JSON object with the key "user" that holds an object with the keys id, email and active.',
    "List three animals as JSON: an object with the key animals, a list of objects with the keys name and legs.",
    "Call the function add with the numbers 2 and 3: answer with a JSON object with the keys function and arguments.",
    "Summarise a recipe for pancakes as JSON with the keys name, minutes and ingredients (a list).",
    "Rate this review as JSON with the keys sentiment and score from 1 to 5: 'The room was clean and quiet.'",
)
MOST_TOKENS = 128
_BEGINNING = "{"
_SAMPLED = Sampling(temperature=0.7, top_p=0.95, seed=1)


def valid_json(model: Model, progress: Callable[[float], None] = lambda fraction: None) -> tuple[int, int]:
    """How many of the answers, one greedy and one sampled to each of PROMPTS, are a JSON object; and of how many."""
    found = 0
    for done, (prompt, sampling) in enumerate(runs := [(p, s) for p in PROMPTS for s in (Sampling(), _SAMPLED)]):
        progress(done / len(runs))
        found += is_object(answer(model, prompt, sampling))
    return found, len(runs)


def answer(model: Model, prompt: str, sampling: Sampling) -> str:
    """What a model says from the brace on, up to where its object ends."""
    ids = model.template.encode([{"role": "user", "content": prompt}]) + model.tokenizer.encode(_BEGINNING, bos=False)
    said = _BEGINNING
    with model.generate(ids, max_tokens=MOST_TOKENS, sampling=sampling, stream=True) as stream:
        for piece in stream:
            said += piece.text
            if is_object(said):
                break
    return said


def is_object(text: str) -> bool:
    """Whether a text begins with a whole JSON object."""
    try:
        found, _ = json.JSONDecoder(parse_constant=_refuse).raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
