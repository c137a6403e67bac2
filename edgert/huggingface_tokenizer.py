"""From tokenizer.json, tokenizer_config.json and chat templates to GGUF's tokenizer.* keys.

Two kinds of tokenizer are known: byte-level BPE (GGUF's "gpt2"), and SentencePiece as BPE with bytes to fall back to
("llama"), whose scores are made of the merges' order. How text is cut is found from the file itself; what edgert's
tokenizer would do otherwise is refused. Normalisation to NFC is passed over, as llama.cpp passes it over.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgert.errors import ModelFileError, UnsupportedError
from edgert.pretokenizers import CONTRACTIONS, PRE_TOKENIZERS
from edgert.sentencepiece import SPACE
from edgert.storage.json_file import JsonObject, read_json, read_text, short
from edgert.vocabulary import SPACE_PREFIX, WHOLE_WORDS, TokenType

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<unused.*>", re.DOTALL)  # though the file may not say so
_WRITES_POST_PROCESSOR = ("LlamaTokenizer", "LlamaTokenizerFast")  # anew, from the options, whatever the file has
_MAX_TEMPLATE = 1 << 20  # bytes
_BOTH_CASES = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": CONTRACTIONS,
    "(?i:[sdmt]|ll|ve|re)": "(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
}
_MODEL_DEFAULTS = {"dropout": 0, "continuing_subword_prefix": "", "end_of_word_suffix": ""}


def tokenizer_keys(
    folder: Path, n_vocab: int, config: JsonObject, generation: JsonObject
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The tokenizer.* keys of a folder, and the files that they come from.

    n_vocab: rows of the embedding table; ids that no token has are filled up. config, generation: config.json and
    generation_config.json, for the ids that end an answer. Raises ModelFileError for files that are missing or make no
    sense, UnsupportedError for a tokenizer that edgert would not follow to the letter.
    """
    path, options_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        raise ModelFileError(
            f"{path}: no such file; download it, or make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    file = read_json(path)
    options = read_json(options_path) if options_path.exists() else JsonObject({}, str(options_path))
    keys = _Words(file, n_vocab).keys()
    ids = {text: id_ for id_, text in enumerate(keys[f"{_PREFIX}tokens"])}
    adds = _added_around(file, options)
    bos, eos = (_special_id(options, name, config, ids, n_vocab) for name in ("bos", "eos"))
    if adds["bos"] is None:
        adds["bos"] = options.boolean("add_bos_token", False) and bos is not None
    keys |= {f"{_PREFIX}add_{name}_token": bool(add) for name, add in adds.items()}
    ends = [id_ for id_ in _ends(config, generation, n_vocab) if id_ != eos]
    if eos is None and ends:
        eos = ends.pop(0)
    if len(ends) > 2:
        generation.refuse("eos_token_id", "GGUF has keys for three ids that end an answer: leave the rarer ones out")
    found = {"bos": bos, "eos": eos, **dict(zip(("eot", "eom"), ends, strict=False))}
    keys |= {f"{_PREFIX}{name}_token_id": id_ for name, id_ in found.items() if id_ is not None}
    templates, template_files = _templates(folder, options)
    files = (path, *((options_path,) if options_path.exists() else ()), *template_files)
    return keys | templates, files


class _Words:
    """What tokenizer.json says of tokens and of how text is cut."""

    def __init__(self, file: JsonObject, n_vocab: int) -> None:
        self._file, self._n_vocab = file, n_vocab
        self._model = file.object("model")
        if self._model.text("type", "BPE") != "BPE":
            self._model.refuse("type", "edgert has BPE only: take a GGUF of the model")
        for key, default in _MODEL_DEFAULTS.items():
            if self._model.get(key) not in (None, default):
                self._model.refuse(key, "edgert's BPE does not have it: take a GGUF of the model")
        self._ids = self._read_ids()

    def keys(self) -> dict[str, Any]:
        """The keys for tokens, their types, merges or scores, and the way that text is cut."""
        merges = self._merges()
        if self._model.boolean("byte_fallback", False):
            special = self._sentencepiece(merges)
        else:
            special = {"model": "gpt2", **self._pre_tokenizer(), "merges": [" ".join(pair) for pair in merges]}
        texts, types = self._tokens(special["model"] == "llama")
        keys = {**special, "tokens": texts, "token_type": np.array(types, np.int32)}
        return {key if "." in key else _PREFIX + key: value for key, value in keys.items()}

    def _read_ids(self) -> dict[str, int]:
        vocabulary = self._model.object("vocab")
        if not vocabulary.values:
            self._model.wrong("vocab", {}, "a vocabulary")
        ids = {text: vocabulary.integer(text, -1) for text in vocabulary.values}
        if max(ids.values()) >= self._n_vocab:
            most = max(ids, key=lambda text: ids[text])
            vocabulary.wrong(most, ids[most], f"below vocab_size = {self._n_vocab} of config.json")
        if len(set(ids.values())) < len(ids):
            self._model.wrong("vocab", "a table with one id twice", "one id for each token")
        return ids

    def _tokens(self, spm: bool) -> tuple[list[str], list[int]]:
        """Texts and types by id; what is added comes over what the model has."""
        texts = [f"[PAD{id_}]" for id_ in range(self._n_vocab)]
        types = [int(TokenType.UNUSED)] * self._n_vocab
        unknown = self._model.get("unk_token")
        for text, id_ in self._ids.items():
            texts[id_], types[id_] = text, TokenType.NORMAL
            if spm and _BYTE.fullmatch(text):
                types[id_] = TokenType.BYTE
            elif spm and text == unknown:
                types[id_] = TokenType.UNKNOWN
        for token in self._file.objects("added_tokens"):
            id_, text = token.integer("id"), token.text("content")
            if id_ >= self._n_vocab:
                continue  # added without a row in the embedding table, as fine-tuning tools do: the model knows no such
            if types[id_] != TokenType.UNUSED and texts[id_] != text:
                token.wrong("content", text, f"{short(texts[id_])}, which token {id_} is already")
            for key in ("lstrip", "rstrip", "single_word"):
                if token.boolean(key, False):
                    token.refuse(key, f"edgert takes {short(text)} as it stands: set it to false if you can do without")
            if types[id_] == TokenType.UNKNOWN:
                continue
            control = token.boolean("special", False) or _LOOKS_SPECIAL.fullmatch(text)
            types[id_] = TokenType.CONTROL if control else TokenType.USER_DEFINED
            texts[id_] = text if control else text.replace(SPACE, " ")
        return texts, types

    def _merges(self) -> list[tuple[str, str]]:
        """Pairs, best first; older files write "left right"."""
        pairs = []
        for merge in self._model.array("merges"):
            match merge.split(" ") if isinstance(merge, str) else merge:
                case [str() as left, str() as right] if left and right and " " not in left and " " not in right:
                    pairs.append((left, right))
                case _:
                    self._model.wrong("merges", merge, "two tokens without spaces")
        return pairs

    # ---- SentencePiece -----------------------------------------------------------------------------------------------
    def _sentencepiece(self, merges: list[tuple[str, str]]) -> dict[str, Any]:
        if self._model.boolean("ignore_merges", False):
            self._model.refuse("ignore_merges", "edgert does not have it with byte_fallback: take a GGUF of the model")
        if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in self._ids]:
            self._model.wrong("vocab", f"without {missing[0]}", "one with tokens for all bytes (byte_fallback)")
        unknown = self._ids.get(self._model.text("unk_token", ""))
        return {
            "model": "llama",
            "pre": "default",
            "scores": self._scores(merges),
            **({} if unknown is None else {"unknown_token_id": unknown}),
            **self._space_prefix(),
        }

    def _scores(self, merges: list[tuple[str, str]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores that join tokens in the order of the merges: a token's is the rank of its first merge, negative.

        SentencePiece joins any two neighbours that make a token, so all such pairs must be among the merges, as they
        are where transformers made them of a SentencePiece model.
        """
        known = set(merges)
        scores = np.zeros(self._n_vocab, np.float32)
        for rank, (left, right) in enumerate(merges):
            text = left + right
            if text not in self._ids or left not in self._ids or right not in self._ids:
                self._model.wrong("merges", f"{left} {right}", "made of tokens")
            if not scores[self._ids[text]]:
                scores[self._ids[text]] = -1.0 - rank
                for cut in range(1, len(text)):
                    pair = text[:cut], text[cut:]
                    if pair not in known and pair[0] in self._ids and pair[1] in self._ids:
                        raise UnsupportedError(
                            f"{self._model.where}: the key merges lacks {short(' '.join(pair))}, so this is no "
                            "SentencePiece model, and edgert has BPE with byte_fallback as one only: take a GGUF"
                        )
        return scores

    def _space_prefix(self) -> dict[str, Any]:
        """Whether and where a space comes before a text."""
        normalizers = _flat(self._file, "normalizer", "normalizers")
        cutters = _flat(self._file, "pre_tokenizer", "pretokenizers")
        prepends = False
        for step in normalizers:
            if step.text("type") == "Prepend" and step.text("prepend") == SPACE:
                prepends = True
            elif step.text("type") != "Replace" or not _is_spaces(step):
                step.refuse("type", f"edgert knows Prepend and Replace of {SPACE!a}: take a GGUF of the model")
        if not cutters:
            return {"add_space_prefix": prepends}
        meta = cutters[0]
        if normalizers or len(cutters) > 1 or meta.text("type") != "Metaspace" or meta.text("replacement") != SPACE:
            meta.refuse("type", "edgert knows Metaspace alone: take a GGUF of the model")
        scheme = meta.text("prepend_scheme", "always" if meta.boolean("add_prefix_space", True) else "never")
        if scheme not in ("always", "first", "never"):
            meta.refuse("prepend_scheme", "edgert knows always, first and never")
        if meta.boolean("split", True) and self._crosses_words():
            meta.refuse("split", "this vocabulary has tokens over several words, which need false")
        return {"add_space_prefix": scheme != "never", **({SPACE_PREFIX: scheme} if scheme != "never" else {})}

    def _crosses_words(self) -> bool:
        return any(SPACE in text[1:] for text in self._ids)

    # ---- byte-level BPE ----------------------------------------------------------------------------------------------
    def _pre_tokenizer(self) -> dict[str, Any]:
        """The name under which edgert knows the way that the file cuts text, and what else it says of words."""
        for step in _flat(self._file, "normalizer", "normalizers"):
            if step.text("type") != "NFC":
                step.refuse("type", "edgert knows NFC, or none: take a GGUF of the model")
        patterns: list[str] = []
        byte_level = False
        for step in _flat(self._file, "pre_tokenizer", "pretokenizers"):
            if byte_level:
                step.refuse("type", "it follows ByteLevel, which edgert knows as the last step only")
            patterns += _patterns(step)
            byte_level = step.text("type") == "ByteLevel"
        same = [name for name, known in PRE_TOKENIZERS.items() if [*map(_canonical, known.patterns)] == patterns]
        if not byte_level or not same:
            raise UnsupportedError(
                f"{self._file.where}: the key pre_tokenizer cuts text by {short(patterns)}"
                f"{' and ByteLevel' if byte_level else ''}; edgert does not know that under any of its "
                f"{len(PRE_TOKENIZERS)} names: take a GGUF of the model"
            )
        whole_words = self._model.boolean("ignore_merges", False)
        for name in same:
            if PRE_TOKENIZERS[name].whole_words == whole_words:
                return {"pre": name}
        return {"pre": same[0], WHOLE_WORDS: whole_words}


def _flat(file: JsonObject, key: str, inner: str) -> list[JsonObject]:
    """The steps of a normalizer or pre-tokenizer: those of a Sequence, or the one; none where the key is null."""
    step = file.object(key)
    if not step.values:
        return []
    return step.objects(inner) if step.text("type") == "Sequence" else [step]


def _is_spaces(step: JsonObject) -> bool:
    """Whether a Replace writes every space as the space sign."""
    return step.object("pattern").values == {"String": " "} and step.text("content") == SPACE


def _patterns(step: JsonObject) -> list[str]:
    """The expressions of edgert.pretokenizers that do what one step of a pre-tokenizer does."""
    kind = step.text("type")
    if kind == "ByteLevel":
        if step.boolean("add_prefix_space", True):
            step.refuse("add_prefix_space", "edgert puts no space before a text: take a GGUF of the model")
        return [PRE_TOKENIZERS["gpt-2"].patterns[0]] if step.boolean("use_regex", True) else []
    if kind == "Digits" and step.boolean("individual_digits", False):
        return [r"\p{N}"]
    if kind == "Split" and (step.text("behavior"), step.boolean("invert", False)) in (
        ("Isolated", False),
        ("Removed", True),  # of what lies between matches, and a known expression leaves nothing between
    ):
        return [_canonical(step.object("pattern").text("Regex", ""))]
    step.refuse("type", "edgert knows Split by an expression (Isolated), Digits one by one, and ByteLevel")


def _canonical(pattern: str) -> str:
    """An expression written as edgert.pretokenizers writes it: letters of both cases where the files switch case off in
    a group, as llama.cpp has them, and escapes for line ends."""
    for theirs, ours in _BOTH_CASES.items():
        pattern = pattern.replace(theirs, ours)
    return unicodedata.normalize("NFC", pattern.replace("\r", r"\r").replace("\n", r"\n"))


def _added_around(file: JsonObject, options: JsonObject) -> dict[str, bool | None]:
    """Whether the start token comes before a text and the end token behind it; None: the file does not say."""
    adds: dict[str, bool | None] = {"bos": None, "eos": False}
    if options.text("tokenizer_class", "") in _WRITES_POST_PROCESSOR and "add_bos_token" in options.values:
        return {name: options.boolean(f"add_{name}_token", False) for name in adds}
    post = file.object("post_processor")
    steps = [] if not post.values else post.objects("processors") if post.text("type") == "Sequence" else [post]
    for step in steps:
        kind = step.text("type")
        if kind == "ByteLevel":
            adds["bos"] = bool(adds["bos"])
            continue
        if kind != "TemplateProcessing":
            step.refuse("type", "edgert knows ByteLevel and TemplateProcessing: take a GGUF of the model")
        parts = step.objects("single")
        is_text = ["Sequence" in part.values for part in parts]
        if is_text.count(True) != 1:
            step.wrong("single", step.get("single"), "a list with one Sequence")
        at, tokens = is_text.index(True), [part.object("SpecialToken").get("id") for part in parts]
        for name, around in (("bos", tokens[:at]), ("eos", tokens[at + 1 :])):
            adds[name] = bool(around)
            if len(around) > 1 or (around and around[0] != _token_text(options, name)):
                step.refuse("single", f"edgert puts {name}_token of tokenizer_config.json there, or nothing")
    return adds


def _token_text(options: JsonObject, name: str) -> str | None:
    """The text of bos_token or eos_token: a string, or an object with its content."""
    value = options.get(f"{name}_token")
    return options.object(f"{name}_token").text("content") if isinstance(value, dict) else value


def _special_id(options: JsonObject, name: str, config: JsonObject, ids: Mapping[str, int], n_vocab: int) -> int | None:
    """The id of the start or end token: by its text in tokenizer_config.json, or else by config.json."""
    if f"{name}_token" in options.values:
        text = _token_text(options, name)
        if text is not None and text not in ids:
            options.wrong(f"{name}_token", text, "a token of tokenizer.json")
        return None if text is None else ids[text]
    return next(iter(_ids(config, f"{name}_token_id", n_vocab)), None)


def _ids(file: JsonObject, key: str, n_vocab: int) -> list[int]:
    """The ids under a key: none, one or a list. Those beyond the vocabulary are never seen, and left out."""
    value = file.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for id_ in values:
        if type(id_) is not int or id_ < 0:
            file.wrong(key, id_, "the id of a token")
    return [id_ for id_ in dict.fromkeys(values) if id_ < n_vocab]


def _ends(config: JsonObject, generation: JsonObject, n_vocab: int) -> list[int]:
    """The ids that end an answer: those of generation_config.json, or else of config.json."""
    return _ids(generation, "eos_token_id", n_vocab) or _ids(config, "eos_token_id", n_vocab)


def _templates(folder: Path, options: JsonObject) -> tuple[dict[str, str], tuple[Path, ...]]:
    """Chat templates under GGUF's keys: from files of their own, or else from tokenizer_config.json."""
    files = {
        _TEMPLATE: folder / "chat_template.jinja",
        f"{_TEMPLATE}.tool_use": folder / "additional_chat_templates" / "tool_use.jinja",
    }
    if files[_TEMPLATE].exists():
        present = {key: path for key, path in files.items() if path.exists()}
        return {key: _template_text(path) for key, path in present.items()}, tuple(present.values())
    value = options.get("chat_template")
    if not isinstance(value, list):
        return ({} if value is None else {_TEMPLATE: options.text("chat_template")}), ()
    named = {entry.text("name"): entry.text("template") for entry in options.objects("chat_template")}
    return {_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}": text for name, text in named.items()}, ()


def _template_text(path: Path) -> str:
    try:
        return read_text(path, _MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not UTF-8 at byte {error.start}; download it again") from error
