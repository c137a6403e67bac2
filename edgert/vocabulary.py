"""The vocabulary that a GGUF file's metadata describe, checked: texts, types, scores and special ids.

It knows which tokens are special and which of them end an answer, the way llama.cpp decides it; how text is
cut into tokens is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import TokenizerError, UnsupportedError
from edgert.pretokenizers import PRE_TOKENIZERS
from edgert.storage.json_file import short

MODELS = ("gpt2", "llama")  # byte-level BPE, SentencePiece BPE

# Where add_space_prefix holds, in words that GGUF has no key for: "always" or "first" as HF's Metaspace means them (not
# before a text that begins with a space; "first": nor behind a special token). Without the key: as llama.cpp does it.
SPACE_PREFIX = "edgert.tokenizer.space_prefix"
# Whether a word that is a token is taken as it is, where a tokenizer.json does not do as others of its name.
WHOLE_WORDS = "edgert.tokenizer.whole_words"

_PREFIX = "tokenizer.ggml."
_NO_PRE = (
    "the file does not say how text is cut into words (tokenizer.ggml.pre is missing): the oldest way is used, and "
    "answers may be worse for it; convert the model again"
)
_NO_ID = 0xFFFFFFFF  # how a converter writes "none" into an unsigned key

# A file seldom lists all tokens that end an answer, so they are also found by their text, as llama.cpp does it.
_STOP_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# Fill-in-the-middle tokens; those of the second group end an answer too. A key in the file overrules the texts.
_INFILL_TEXTS = {
    "fim_pre_token_id": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf_token_id": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid_token_id": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
}
_INFILL_STOP_TEXTS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}


class TokenType(IntEnum):
    """What GGUF says of each token."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with everything that the metadata say of them."""

    model: str  # one of MODELS
    pre: str  # the pre-tokenizer of a gpt2 model, "default" where the file names none
    whole_words: bool  # see edgert.pretokenizers
    tokens: list[str]  # text by id, as the file writes it
    ids: dict[str, int]  # the way back
    types: npt.NDArray[np.uint8]  # TokenType by id
    scores: npt.NDArray[np.float32] | None  # by id; only of a llama model
    merges: list[str]  # "left right", best first; only of a gpt2 model
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    space_prefix: str  # see SPACE_PREFIX, "" where the file does not have it
    strips_after: frozenset[int]  # special tokens that swallow the white space behind them
    warning: str  # what the file leaves open and edgert had to guess, for the person; mostly empty

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check the tokenizer.* keys.

        Raises TokenizerError for keys that are missing or contradict each other, UnsupportedError for a model
        or pre-tokenizer that edgert does not know.
        """
        model, pre = _model_and_pre(metadata)
        tokens = _tokens(metadata)
        ids = {text: id_ for id_, text in enumerate(tokens)}
        if len(ids) < len(tokens):
            raise _duplicate(tokens, ids)
        types = _types(metadata, tokens)
        spm = model == "llama"
        merges = [] if spm else _strings(metadata, "merges")
        stop_ids = _mark_special(metadata, ids, types, merges)
        defaults = (("bos", 1), ("eos", 2), ("unknown", 0), ("eot", None), ("eom", None))
        special = {
            name: _special_id(metadata, f"{name}_token_id", len(tokens), default if spm else None)
            for name, default in defaults
        }
        return cls(
            model=model,
            pre=pre,
            whole_words=_flag(metadata, WHOLE_WORDS, PRE_TOKENIZERS[pre].whole_words) if not spm else False,
            tokens=tokens,
            ids=ids,
            types=types,
            scores=_scores(metadata, len(tokens)) if spm else None,
            merges=merges,
            bos_id=special["bos"],
            eos_id=special["eos"],
            unknown_id=special["unknown"],
            stop_ids=stop_ids | {id_ for name in ("eos", "eot", "eom") if (id_ := special[name]) is not None},
            add_bos=_add_token(metadata, "bos", special["bos"], spm or PRE_TOKENIZERS[pre].add_bos),
            add_eos=_add_token(metadata, "eos", special["eos"], False),
            add_space_prefix=_flag(metadata, _PREFIX + "add_space_prefix", spm),
            space_prefix=_space_prefix(metadata),
            strips_after=_strips_after(metadata, tokens, types),
            warning=_NO_PRE if not spm and not metadata.get(_PREFIX + "pre") else "",
        )

    def special_tokens(self) -> list[int]:
        """The ids that are looked for in a text before it is cut into ordinary tokens, longest text first."""
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        found: list[int] = np.flatnonzero(np.isin(self.types, kinds)).tolist()
        return sorted(found, key=lambda id_: -len(self.tokens[id_].encode()))


def _model_and_pre(metadata: Mapping[str, Any]) -> tuple[str, str]:
    model = metadata.get(_PREFIX + "model")
    if not isinstance(model, str):
        raise TokenizerError(
            f"{_PREFIX}model is {'missing' if model is None else repr(model)}: the file has no"
            " vocabulary; convert the model again, with its tokenizer"
        )
    if model not in MODELS:
        raise UnsupportedError(
            f"{_PREFIX}model is {model!r}, which is not supported; supported are {', '.join(MODELS)}"
        )
    pre = metadata.get(_PREFIX + "pre") or "default"
    if model == "gpt2" and (not isinstance(pre, str) or pre not in PRE_TOKENIZERS):
        near = " or ".join(get_close_matches(str(pre), PRE_TOKENIZERS, n=2)) or "none"
        raise UnsupportedError(
            f"{_PREFIX}pre is {short(pre)}: edgert does not know how that cuts text. The nearest of the "
            f"{len(PRE_TOKENIZERS)} names that it knows: {near}; take a newer edgert, or another file of the model"
        )
    return model, str(pre)


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    """A list of strings that a vocabulary cannot be without."""
    values = metadata.get(_PREFIX + name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values[:1]):
        found = "missing" if values is None else "not a list of strings"
        raise TokenizerError(f"{_PREFIX}{name} is {found}; convert the model again, with its tokenizer")
    return values


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise TokenizerError(f"{_PREFIX}tokens is empty; convert the model again, with its tokenizer")
    try:
        "\n".join(tokens).encode()
    except UnicodeEncodeError:
        wrong = next(
            id_
            for id_, text in enumerate(tokens)
            if text.encode(errors="replace") != text.encode(errors="surrogatepass")
        )
        raise TokenizerError(
            f"{_PREFIX}tokens: token {wrong} is not valid UTF-8 ({tokens[wrong]!a}); the file is"
            " corrupt: download or convert it again"
        ) from None
    if "" in tokens:  # padding of some converters; the text only has to be unlike all others
        tokens = [text or f"[EMPTY_{id_}]" for id_, text in enumerate(tokens)]
    return tokens


def _duplicate(tokens: list[str], ids: dict[str, int]) -> TokenizerError:
    first = next(id_ for id_, text in enumerate(tokens) if ids[text] != id_)
    return TokenizerError(
        f"{_PREFIX}tokens: tokens {first} and {ids[tokens[first]]} are both {tokens[first]!r};"
        " the file is corrupt: convert it again"
    )


def _numbers(metadata: Mapping[str, Any], name: str, n_tokens: int) -> npt.NDArray[Any] | None:
    """A number for each token, or None where the file has no such key."""
    values = metadata.get(_PREFIX + name)
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (n_tokens,) or array.dtype.kind not in "iuf":
        found = f"{array.shape[0]:,} values" if array.ndim == 1 else f"a {type(values).__name__}"
        raise TokenizerError(
            f"{_PREFIX}{name} has {found} for {n_tokens:,} tokens, it must have one number for"
            " each; the file is corrupt: convert it again"
        )
    return array


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> npt.NDArray[np.uint8]:
    types = _numbers(metadata, "token_type", len(tokens))
    if types is None:
        return np.full(len(tokens), TokenType.NORMAL, np.uint8)
    if (wrong := np.flatnonzero(~np.isin(types, list(TokenType)))).size:
        raise TokenizerError(
            f"{_PREFIX}token_type: token {wrong[0]} has the type {types[wrong[0]]}, known are 0 to"
            f" {max(TokenType)}; the file is corrupt: convert it again"
        )
    return types.astype(np.uint8)


def _scores(metadata: Mapping[str, Any], n_tokens: int) -> npt.NDArray[np.float32]:
    scores = _numbers(metadata, "scores", n_tokens)
    if scores is None or np.isnan(scores).any():
        found = "missing" if scores is None else f"not a number for token {np.isnan(scores).argmax()}"
        raise TokenizerError(f"{_PREFIX}scores is {found}, and a llama vocabulary needs them; convert the model again")
    return scores.astype(np.float32)


def _special_id(metadata: Mapping[str, Any], name: str, n_tokens: int, default: int | None) -> int | None:
    value = metadata.get(_PREFIX + name)
    if value is None:
        return default if default is not None and default < n_tokens else None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TokenizerError(f"{_PREFIX}{name} is {value!r}, not a token id; convert the model again")
    if value in (-1, _NO_ID):
        return None
    if not 0 <= value < n_tokens:
        raise TokenizerError(
            f"{_PREFIX}{name} is {value}, but the vocabulary has only the ids 0 to {n_tokens - 1};"
            " the file is corrupt: convert it again"
        )
    return int(value)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool | np.bool_):
        raise TokenizerError(f"{key} is {value!r}, not true or false; convert the model again")
    return bool(value)


def _space_prefix(metadata: Mapping[str, Any]) -> str:
    value = metadata.get(SPACE_PREFIX, "")
    if value not in ("", "always", "first"):
        raise UnsupportedError(f"{SPACE_PREFIX} is {value!r:.60}; supported are always and first")
    return str(value)


def _add_token(metadata: Mapping[str, Any], name: str, id_: int | None, default: bool) -> bool:
    add = _flag(metadata, f"{_PREFIX}add_{name}_token", default and id_ is not None)
    if add and id_ is None:
        raise TokenizerError(
            f"{_PREFIX}add_{name}_token is true, but {_PREFIX}{name}_token_id is missing; convert the model again"
        )
    return add


def _mark_special(
    metadata: Mapping[str, Any], ids: dict[str, int], types: npt.NDArray[np.uint8], merges: list[str]
) -> frozenset[int]:
    """Make control tokens of those that are known by their text, and return the ones that end an answer."""
    stops = _by_text(_STOP_TEXTS, ids, types, merges)
    controls = set(stops)
    for name, texts in (_INFILL_TEXTS | _INFILL_STOP_TEXTS).items():
        if (id_ := _special_id(metadata, name, len(types), None)) is not None:
            found = {id_}
        else:
            found = _by_text(texts, ids, types, merges)
            controls |= found
        if name in _INFILL_STOP_TEXTS:
            stops |= found
    types[list(controls)] = TokenType.CONTROL
    if (end := ids.get("<|end|>")) is not None:  # where these exist it only ends a message, not the answer
        names = {text for text in ("<|return|>", "<|call|>", "<|calls|>", "<|flush|>") if text in ids}
        if names >= {"<|return|>", "<|call|>"} or ("<|flush|>" in names and names & {"<|call|>", "<|calls|>"}):
            stops.discard(end)
    return frozenset(stops)


def _by_text(texts: tuple[str, ...], ids: dict[str, int], types: npt.NDArray[np.uint8], merges: list[str]) -> set[int]:
    """The tokens with these texts. Left out, unlike in llama.cpp: ordinary tokens that merges make, as "</s>" in
    Qwen's vocabulary, which is the end of struck-out HTML there and not of the answer."""
    return {
        ids[text]
        for text in texts
        if text in ids
        and not (
            types[ids[text]] == TokenType.NORMAL
            and not {f"{text[:i]} {text[i:]}" for i in range(1, len(text))}.isdisjoint(merges)
        )
    }


def _strips_after(metadata: Mapping[str, Any], tokens: list[str], types: npt.NDArray[np.uint8]) -> frozenset[int]:
    """Phi-3's tokens do so; GGUF has no key for it, so the model's name must tell, as in llama.cpp."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return frozenset(
        id_
        for id_ in np.flatnonzero(np.isin(types, kinds)).tolist()
        if tokens[id_] not in ("<unk>", "<s>", "<|endoftext|>")
    )
