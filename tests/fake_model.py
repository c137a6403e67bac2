"""A stand-in for edgert.model: no weights, the real Stream, answers that repeat the question.

Tests call `install()`; as a program it runs the command line on it: python fake_model.py chat --prompt hi
"""

from __future__ import annotations

import os
import sys
import time
import types
from dataclasses import dataclass

from edgert.chat_template import ChatTemplate
from edgert.errors import ContextLengthError, ModelFileError
from edgert.generation import StopRules, Stream, Usage
from edgert.reasoning import Marks
from edgert.sampling import Sampling

DESCRIPTION = {
    "path": "/models/fake.gguf",
    "name": "fake",
    "architecture": "granitemoe",
    "parameters": 134515008,
    "bytes": {"total": 129337952, "hot": 80 << 20, "cold": 3 << 30},
    "bpw": 4.5312,
    "tensor_types": {"Q4_0": 1536, "F32": 100},
    "layers": 30,
    "experts": {"count": 16, "used": 2, "shared": 1, "layers": 30, "bytes_each": 62208, "working_set": 3732480},
    "context_length": 8192,
    "vocabulary": {"model": "gpt2", "pre": "smollm", "size": 49152},
    "tokenizer": {"bos": 1, "eos": 2, "stop": [2, 7]},
    "template": {"source": "model", "supports_tools": False, "supports_system": True},
    "memory": {
        "hot": 1,
        "cold": 2,
        "kv": 3072,
        "work": 4,
        "process": 5,
        "total": 15,
        "residency": 0.253,
        "context": 8192,
        "kv_type": "f16",
    },
}


@dataclass
class Perplexity:
    value: float = 26.0612
    standard_error: float = 1.23449
    n_chunks: int = 2
    n_tokens: int = 1024


class Characters:
    """Tokenizer and detokenizer: a token is a character."""

    warning, control_texts, bos_id, eos_id = "", (), None, None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [ord(c) for c in (f"<{text}>" if special else text)]

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


class Model:
    """Answers 'You said: ...'; `calls` keeps what it was asked, `delay_s` passes before each token.

    thinks: before it answers, as its template marks; switch: the variable that its template reads for that.
    """

    def __init__(
        self, name="fake", n_context=2048, delay_s=0.0, is_default=False, thinks=False, switch="enable_thinking"
    ):
        self.name, self.n_context, self.delay_s = name, n_context, delay_s
        reads = ChatTemplate(f"{{{{ {switch} }}}}" if thinks else "", Characters())
        self.template = types.SimpleNamespace(is_default=is_default, asking=reads.asking)
        self.thinks = thinks
        self.defaults = Sampling(temperature=0.7, repetition_penalty=1.1)
        self.memory = types.SimpleNamespace(warning="")
        self.skipped = ""
        self.tokenizer = Characters()
        self.calls, self.loaded, self.closed, self.cached = [], {}, 0, ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed += 1

    def chat(self, messages, *, stream, sampling, max_tokens=None, stop=(), variables=None):
        given = {"sampling": sampling, "max_tokens": max_tokens, "stop": stop}
        self.calls.append({"messages": messages, "variables": variables, **given})
        prompt = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        answer = f"You said: {messages[-1]['content']}"
        if self.thinks and (variables or {}).get("enable_thinking", True):
            so = {"low": "So.", "high": "Hm, hm, so."}.get((variables or {}).get("reasoning_effort"), "Hm, so.")
            answer = f"<think>\n{so}\n</think>\n\n{answer}"
        return self._stream(f"{prompt}<assistant>", answer, max_tokens, stop)

    def generate(self, prompt, *, stream, sampling, max_tokens=None, stop=()):
        self.calls.append({"prompt": prompt, "sampling": sampling, "max_tokens": max_tokens, "stop": stop})
        prompt = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        return self._stream(prompt, prompt[::-1], max_tokens, stop)

    def perplexity(self, text, *, chunk, n_chunks, progress):
        self.calls.append({"text": text, "chunk": chunk, "n_chunks": n_chunks})
        progress(0.5, 25.0)
        progress(1.0, 26.06)
        return Perplexity()

    def _stream(self, prompt, answer, max_tokens, stop):
        if len(prompt) >= self.n_context:
            raise ContextLengthError(f"the prompt has {len(prompt)} tokens and the context {self.n_context}")
        same = max(n for n in range(len(prompt)) if self.cached.startswith(prompt[:n]))

        def tokens():
            for character in answer[: self.n_context - len(prompt)]:
                time.sleep(self.delay_s)
                yield ord(character), None
                self.cached = prompt + answer
            if len(prompt) + len(answer) <= self.n_context:
                yield 0, None

        counts = {"expert_hits": 3, "expert_misses": 1, "bytes_read": 2048, "flash_wait_s": 0.01, "flash_busy_s": 0.02}
        usage = Usage(prompt_tokens=len(prompt), cached_tokens=same, prefetch_useful=1024, **counts)
        rules = StopRules(stop_ids={0}, stop=stop, max_tokens=max_tokens)
        splitter = Marks("<think>", "</think>").splitter("", {}) if self.thinks else None
        return Stream(tokens(), Characters(), rules, splitter=splitter, usage=usage)


def install(model: Model, set_module=sys.modules.__setitem__) -> Model:
    """Put a module whose load() gives `model` in the place of edgert.model."""

    def load(path=None, *, progress, **options):
        progress("reading the weights", 0.5)
        if path == "absent.gguf":
            raise ModelFileError("absent.gguf: there is no such file:\ngive the path of a GGUF file")
        model.loaded = {"path": path, **options}
        return model

    module = types.ModuleType("edgert.model")
    module.load, module.Model = load, Model
    set_module("edgert.model", module)
    describing = types.ModuleType("edgert.describing")
    describing.describe = lambda path, context=None, memory=None: DESCRIPTION
    set_module("edgert.describing", describing)
    return model


if __name__ == "__main__":
    install(
        Model(
            delay_s=float(os.environ.get("DELAY_S", "0")),
            n_context=int(os.environ.get("N_CONTEXT", "2048")),
            is_default="CHATML" in os.environ,
            thinks="THINKS" in os.environ,
            switch=os.environ.get("SWITCH", "enable_thinking"),
        )
    )
    from edgert.cli.main import main

    main()
