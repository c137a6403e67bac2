"""A request: what an answer's tokens are made of, checked against the model before anything runs.

Model makes requests and answers them; nobody else needs to know of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from edgert.errors import ContextLengthError, OptionError
from edgert.generation import Stream, Usage
from edgert.reasoning import Splitter
from edgert.sampling import Sampler, Sampling


@dataclass
class Request:
    """What the maker of an answer's tokens needs."""

    ids: list[int]
    sampler: Sampler
    n_logprobs: int | None
    usage: Usage
    keep: Sequence[int] = ()  # with how many of the ids others will begin, where that is known
    splitter: Splitter | None = None  # of reasoning and answer
    shown: Collection[int] = ()  # control tokens whose text comes through
    cancelled: threading.Event = field(default_factory=threading.Event)
    stream: weakref.ref[Stream] | None = None  # where the caller reads it piece by piece

    @classmethod
    def checked(
        cls, ids: list[int], sampling: Sampling, n_logprobs: int | None, n_context: int, n_vocab: int
    ) -> Request:
        """A request for the answer to `ids`. OptionError, ContextLengthError for what the model cannot take."""
        if not ids:
            raise OptionError("the prompt is empty; give at least one token")
        if len(ids) > n_context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds {n_context}; shorten it or use a larger --context"
            )
        outside = next((token for token in sampling.logit_bias if not 0 <= token < n_vocab), None)
        if outside is not None:
            raise OptionError(f"logit_bias has token {outside}, outside the vocabulary of {n_vocab}")
        return cls(ids, Sampler(sampling), n_logprobs, Usage(prompt_tokens=len(ids)))

    def handed_out(self, answer: Stream) -> Stream:
        """The answer, for a caller that reads it piece by piece; Model.close() must find it, not keep it alive."""
        self.stream = weakref.ref(answer)
        return answer
