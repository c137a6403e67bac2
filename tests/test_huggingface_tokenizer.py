"""tokenizer.json to GGUF's keys: the same ids as llama.cpp's record and as HF tokenizers, and refusals of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import tokenizer_json, write_json, write_tokenizer
from published_pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS, cut_by
from tokenizers import Tokenizer as HfTokenizer
from vocabularies import CONTROL, GOLDEN, SHARED, USER_DEFINED, byte_level, pair_merges, sentencepiece

from edgert.chat_template import ChatTemplate
from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.huggingface_tokenizer import tokenizer_keys
from edgert.pretokenizers import PRE_TOKENIZERS as KNOWN
from edgert.storage.gguf_file import GgufFile
from edgert.storage.json_file import JsonObject
from edgert.tokenizer import Tokenizer

KEY = "tokenizer.ggml."
NOTHING = JsonObject({}, "config.json")
TEXTS = (
    *("a b  c", " a", "  a", "a ", "", "\n\nab\t\tb", "ab" * 40, " " * 37 + "a", "\u00e9\u4f60\u597d\U0001f600"),
    *("<s>a b", "<s> a", "a<s>b<s> a<x> b", "<x>a", "▁a", "<s>▁a"),
)


def keys_of(folder: Path, n_vocab: int, config: Any = None, generation: Any = None) -> dict[str, Any]:
    """What the folder's files give."""
    files = [JsonObject(values or {}, name) for values, name in ((config, "config"), (generation, "generation"))]
    return tokenizer_keys(folder, n_vocab, *files)[0]


def tokenizer_of(folder: Path, n_vocab: int, name: str = "") -> Tokenizer:
    return Tokenizer.from_metadata({"general.name": name, **keys_of(folder, n_vocab)})


# --- real vocabularies


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3", "deepseek-llm", "falcon"])
def test_llama_cpp_vocabularies(name: str, tmp_path: Path) -> None:
    path = SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with GgufFile.open(path) as file:
        metadata = dict(file.metadata)
    if (pre := metadata[KEY + "pre"]) not in PRE_TOKENIZERS and metadata[KEY + "model"] == "gpt2":
        write_tokenizer(tmp_path, metadata | {KEY + "pre": "gpt-2"}, pre_tokenizer=cut_by(*KNOWN[pre].patterns))
    else:
        write_tokenizer(tmp_path, metadata)
    tokenizer = tokenizer_of(tmp_path, len(metadata[KEY + "tokens"]), metadata.get("general.name", ""))
    reference = HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cases = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    results = Path(f"{path}.out").read_text().split("\n")
    assert len(cases) > 40 and len(results) >= len(cases)
    for text, line in zip(cases, results, strict=False):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == text
        assert reference.encode(text, add_special_tokens=False).ids == ids  # so the file says the same


def golden_group(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """llama.cpp's cases for a pre-tokenizer, and the metadata of the model that they were made with."""
    for folder in GOLDEN:
        if (folder / "tokenizer_cases.json").exists():
            group = json.loads((folder / "tokenizer_cases.json").read_text(encoding="utf-8"))[name]
            if (folder / group["model"]).exists():
                with GgufFile.open(folder / group["model"]) as file:
                    return group, dict(file.metadata)
    pytest.skip("tokenizer_cases.json or its model is not here")


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_golden_cases(name: str, tmp_path: Path) -> None:
    group, metadata = golden_group(name)
    write_tokenizer(tmp_path, metadata)
    tokenizer = tokenizer_of(tmp_path, 300)
    for cases, special in (("plain", False), ("parse_special", True)):
        for case in group[cases]:
            assert tokenizer.encode(case["text"], special=special) == case["ids"], case["text"]


TO_CUT = ("The 1234 cats' toys!\n\n 'tis DeepSeek\u4f60\u597d, it'S", "e\u0301a  b\tc\r\n 12 345 6789/\n ")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_way_of_cutting_is_found(name: str, turned: bool, tmp_path: Path) -> None:
    """Also where a file takes whole words though others of that name do not, or does not though they do."""
    metadata = byte_level(pair_merges(TO_CUT), {"<s>": CONTROL}, words=["toys"], bos_token_id=0)
    file = tokenizer_json(metadata)
    whole_words = (name in WHOLE_WORDS) != turned
    file["pre_tokenizer"], file["model"]["ignore_merges"] = PRE_TOKENIZERS[name], whole_words
    keys = keys_of(plain_folder(tmp_path, file, {"eos_token": None}), len(metadata[KEY + "tokens"]))
    found = KNOWN[keys[KEY + "pre"]]
    assert found.patterns == KNOWN[name].patterns
    assert keys.get("edgert.tokenizer.whole_words", found.whole_words) == whole_words
    ours, theirs = Tokenizer.from_metadata(keys), HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TO_CUT, "toys"):
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
    assert (len(ours.encode("toys", bos=False)) == 1) == whole_words


@pytest.mark.parametrize(("kind", "bos"), [("LlamaTokenizerFast", True), ("PreTrainedTokenizerFast", False)])
def test_a_llama_tokenizer_adds_the_start_token_itself(kind: str, bos: bool, tmp_path: Path) -> None:
    """As DeepSeek's files have it: nothing about it in tokenizer.json, which the class of transformers rewrites."""
    file = tokenizer_json(PLAIN) | {"post_processor": PRE_TOKENIZERS["gpt-2"]}
    options = {"tokenizer_class": kind, "add_bos_token": True, "bos_token": {"content": "<s>"}}
    tokenizer = Tokenizer.from_metadata(keys_of(plain_folder(tmp_path, file, options), N_PLAIN))
    assert tokenizer.add_bos == bos and (tokenizer.encode("a")[0] == tokenizer.bos_id) == bos


# --- SentencePiece as BPE with byte fallback

RUNS = {"▁" * n: -1e9 for n in range(1, 17)}
SPM = sentencepiece(
    {"ab": -1.0, "▁a": -2.0, "ba": -3.0, "aba": -4.0, "▁ab": -5.0, **dict.fromkeys("ab", -6.0), **RUNS},
    {"<x>": USER_DEFINED},
    bos_token_id=1,
    eos_token_id=2,
    add_bos_token=True,
)
N_SPM = len(SPM[KEY + "tokens"])


@pytest.mark.parametrize("scheme", ["prepend", "replace", "always", "first", "never"])
def test_spaces_before_a_text(scheme: str, tmp_path: Path) -> None:
    """Where the file puts a space before a text, by normalizer or by Metaspace, ours is there too."""
    steps = tokenizer_json(SPM)["normalizer"]["normalizers"]
    if scheme in ("prepend", "replace"):
        changes: dict[str, Any] = {
            "normalizer": {"type": "Sequence", "normalizers": steps if scheme == "prepend" else steps[1:]}
        }
    else:
        meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        changes = {"normalizer": None, "pre_tokenizer": meta}
    write_tokenizer(tmp_path, SPM, **changes)
    ours, theirs = tokenizer_of(tmp_path, N_SPM), HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, special=True) == theirs.encode(text).ids, (scheme, text)


def test_sentencepiece_keys(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, SPM)
    keys = keys_of(tmp_path, N_SPM + 2)
    for key in ("model", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert keys[KEY + key] == SPM[KEY + key]
    assert keys[KEY + "unknown_token_id"] == 0
    assert keys[KEY + "tokens"] == [*SPM[KEY + "tokens"], f"[PAD{N_SPM}]", f"[PAD{N_SPM + 1}]"]
    assert keys[KEY + "token_type"].tolist() == [*SPM[KEY + "token_type"], 5, 5]
    scores, before = keys[KEY + "scores"], np.array(SPM[KEY + "scores"])
    joined = [id_ for id_, text in enumerate(SPM[KEY + "tokens"]) if len(text) > 1 and set(text) <= set("ab▁")]
    ranks, expected = np.argsort(-scores[joined], kind="stable"), np.argsort(-before[joined], kind="stable")
    assert (ranks[:5] == expected[:5]).all() and (scores[joined] < 0).all()


def test_merges_that_are_no_sentencepiece_model(tmp_path: Path) -> None:
    file = tokenizer_json(SPM)
    assert "a ba" in file["model"]["merges"]
    file["model"]["merges"].remove("a ba")
    write_json(tmp_path / "tokenizer.json", file)
    with pytest.raises(UnsupportedError, match="merges lacks 'a ba', so this is no SentencePiece model"):
        keys_of(tmp_path, N_SPM)


# --- ids, templates and what else tokenizer_config.json says

SPECIAL = {"<s>": CONTROL, "</s>": CONTROL, "<e1>": CONTROL, "<e2>": CONTROL, "<e3>": CONTROL, "<u>": USER_DEFINED}
PLAIN = byte_level(["a b"], SPECIAL, bos_token_id=257, eos_token_id=258, add_bos_token=False)
N_PLAIN = len(PLAIN[KEY + "tokens"])


def plain_folder(folder: Path, file: Any = None, options: Any = None) -> Path:
    write_json(folder / "tokenizer.json", tokenizer_json(PLAIN) | (file or {}))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"} | (options or {}))
    return folder


def template(*parts: str) -> dict[str, Any]:
    """A post-processor; "A" is the text."""
    names = [("Sequence" if part == "A" else "SpecialToken", part) for part in parts]
    single = [{kind: {"id": part, "type_id": 0}} for kind, part in names]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("post", "options", "bos", "eos"),
    [
        (None, {}, False, False),
        (None, {"add_bos_token": True}, True, False),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, False, False),  # the file counts
        (template("<s>", "A"), {}, True, False),
        (template("A", "</s>"), {}, False, True),
        (template("<s>", "A", "</s>"), {"bos_token": {"content": "<s>", "special": True}}, True, True),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", "A")]}, {}, True, False),
    ],
)
def test_tokens_around_a_text(post: Any, options: Any, bos: bool, eos: bool, tmp_path: Path) -> None:
    keys = keys_of(plain_folder(tmp_path, {"post_processor": post}, options), N_PLAIN)
    assert (keys[KEY + "add_bos_token"], keys[KEY + "add_eos_token"]) == (bos, eos)
    assert Tokenizer.from_metadata(keys).encode("ab") == [257] * bos + [256] + [258] * eos


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, {"bos": 257, "eos": 258}),
        ({"eos_token_id": 259}, {}, {"bos": 257, "eos": 258, "eot": 259}),
        (
            {"eos_token_id": 259},
            {"eos_token_id": [260, 258, 261, 99999]},
            {"bos": 257, "eos": 258, "eot": 260, "eom": 261},
        ),
    ],
)
def test_ids_that_end_an_answer(config: Any, generation: Any, expected: dict[str, int], tmp_path: Path) -> None:
    keys = keys_of(plain_folder(tmp_path), N_PLAIN, config, generation)
    found = {key: value for key, value in keys.items() if key.endswith("_token_id")}
    assert found == {f"{KEY}{name}_token_id": id_ for name, id_ in expected.items()}
    assert Tokenizer.from_metadata(keys).stop_ids >= set(expected.values()) - {257}


def test_without_tokenizer_config_the_ids_are_config_s(tmp_path: Path) -> None:
    plain_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    keys = keys_of(tmp_path, N_PLAIN, {"bos_token_id": 257, "eos_token_id": [259, 260]})
    assert [keys[f"{KEY}{name}_token_id"] for name in ("bos", "eos", "eot")] == [257, 259, 260]
    assert keys[KEY + "add_bos_token"] is False


def test_no_start_token_where_the_config_says_so(tmp_path: Path) -> None:
    """Qwen's config.json names an id that its tokenizer does not start with."""
    keys = keys_of(plain_folder(tmp_path, options={"bos_token": None}), N_PLAIN, {"bos_token_id": 257})
    assert KEY + "bos_token_id" not in keys


def test_chat_templates(tmp_path: Path) -> None:
    two = [{"name": "default", "template": "{{ bos_token }}A"}, {"name": "tool_use", "template": "B"}]
    plain_folder(tmp_path, options={"chat_template": two})

    def render(**options: Any) -> str:
        keys = keys_of(tmp_path, N_PLAIN)
        return ChatTemplate.from_metadata(keys, Tokenizer.from_metadata(keys)).render([], **options)

    assert render() == "<s>A" and render(tools=[{}]) == "B"
    (tmp_path / "chat_template.jinja").write_text("C", encoding="utf-8")
    assert render() == "C" and render(tools=[{}]) == "C"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("D", encoding="utf-8")
    assert render() == "C" and render(tools=[{}]) == "D"


def test_added_tokens_have_types(tmp_path: Path) -> None:
    """Some files mark control tokens as ordinary ones; their form tells."""
    added = [
        {"id": 400 + i, "content": text, "special": special}
        for i, (text, special) in enumerate([("<c>", True), ("<|im_end|>", False), ("a▁b", False)])
    ]
    file = {"added_tokens": [*tokenizer_json(PLAIN)["added_tokens"], *added]}
    keys = keys_of(plain_folder(tmp_path, file), 403)
    assert keys[KEY + "token_type"][400:].tolist() == [CONTROL, CONTROL, USER_DEFINED]
    assert keys[KEY + "tokens"][399:] == ["[PAD399]", "<c>", "<|im_end|>", "a b"]


def test_an_added_token_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    """Tools that fine-tune add padding that no row of the table stands for."""
    keys = keys_of(plain_folder(tmp_path), N_PLAIN - 1)
    assert keys[KEY + "tokens"] == PLAIN[KEY + "tokens"][:-1]


# --- refusals: (what is changed in tokenizer.json, the message)

Change = Callable[[dict[str, Any]], Any]
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = PRE_TOKENIZERS["gpt-2"]
MAIN = tokenizer_json(PLAIN)


def model(**changes: Any) -> Change:
    return lambda file: file["model"].update(changes)


def whole(**changes: Any) -> Change:
    return lambda file: file.update(changes)


def first_added(**changes: Any) -> Change:
    return lambda file: file["added_tokens"][0].update(changes)


REFUSED: list[tuple[Change, str]] = [
    (model(type="Unigram"), "type is 'Unigram'; edgert has BPE only"),
    (model(dropout=0.1), "dropout is 0.1; edgert's BPE does not"),
    (model(continuing_subword_prefix="##"), "continuing_subword_prefix is '##'; edgert's BPE does not"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'; edgert's BPE does not"),
    (whole(pre_tokenizer=SPLIT), r"cuts text by \['\\\\w\+'\]; edgert does not know that under any of its \d+ names"),
    (whole(pre_tokenizer={"type": "Whitespace"}), "type is 'Whitespace'; edgert knows Split"),
    (whole(pre_tokenizer={"type": "Digits", "individual_digits": False}), "type is 'Digits'; edgert knows Split"),
    (whole(pre_tokenizer=SPLIT | {"behavior": "Removed"}), "type is 'Split'; edgert knows Split"),
    (whole(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space is True; edgert puts no space"),
    (
        whole(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}),
        "type is 'ByteLevel'; it follows ByteLevel",
    ),
    (whole(pre_tokenizer=None), r"cuts text by \[\]; edgert"),
    (whole(normalizer={"type": "Lowercase"}), "type is 'Lowercase'; edgert knows NFC"),
    (whole(post_processor={"type": "BertProcessing"}), "type is 'BertProcessing'; edgert knows ByteLevel"),
    (whole(post_processor=template("<s>", "<e1>", "A")), "puts bos_token of tokenizer_config.json there"),
    (whole(post_processor=template("<e1>", "A")), "puts bos_token of tokenizer_config.json there"),
    (first_added(lstrip=True), "lstrip is True; edgert takes '<s>' as it stands: set it to false"),
    (first_added(rstrip=True), "rstrip is True; edgert takes '<s>'"),
    (first_added(single_word=True), "single_word is True; edgert takes '<s>'"),
]
DAMAGED: list[tuple[Change, str]] = [
    (model(vocab={}), "vocab is {}, not a vocabulary"),
    (model(vocab={"a": 0, "b": 0}), "vocab is 'a table with one id twice', not one id for each token"),
    (model(vocab={"a": N_PLAIN}), f"the key a is {N_PLAIN}, not below vocab_size = {N_PLAIN} of config.json"),
    (model(vocab={"a": -1}), "the key a is -1"),
    (model(vocab={"a": "0"}), "the key a is '0'"),
    (model(vocab=[]), r"vocab is \[\], not an object"),
    (model(merges=["a b c"]), "merges is 'a b c', not two tokens"),
    (model(merges=[["a", ""]]), r"merges is \['a', ''\], not two tokens"),
    (model(merges=[["a", 1]]), r"merges is \['a', 1\], not two tokens"),
    (model(merges=[None]), "merges is None, not two tokens"),
    (model(merges="a b"), "merges is 'a b', not a list"),
    (first_added(id=0), "content is '<s>', not .*, which token 0 is already"),
    (first_added(id=-1), "id is -1, not a whole number"),
    (first_added(content=5), "content is 5, not a string"),
    (whole(added_tokens=[7]), r"added_tokens is 7, not a list of objects"),
    (whole(post_processor=template("<s>", "A", "A")), "not a list with one Sequence"),
    (whole(normalizer="NFC"), "normalizer is 'NFC', not an object"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused(change: Change, message: str, tmp_path: Path) -> None:
    file = json.loads(json.dumps(MAIN))
    change(file)
    with pytest.raises(UnsupportedError, match=message) as caught:
        keys_of(plain_folder(tmp_path, file), N_PLAIN)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=lambda value: value if isinstance(value, str) else "")
def test_damaged(change: Change, message: str, tmp_path: Path) -> None:
    file = json.loads(json.dumps(MAIN))
    change(file)
    with pytest.raises(ModelFileError, match=message) as caught:
        keys_of(plain_folder(tmp_path, file), N_PLAIN)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model(ignore_merges=True), "ignore_merges is True; edgert does not have it with byte_fallback"),
        (whole(normalizer={"type": "NFKC"}), "type is 'NFKC'; edgert knows Prepend and Replace"),
        (whole(normalizer={"type": "Prepend", "prepend": "_"}), "type is 'Prepend'; edgert knows Prepend and"),
        (whole(normalizer=None, pre_tokenizer=BYTE_LEVEL), "type is 'ByteLevel'; edgert knows Metaspace alone"),
        (
            whole(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
            "split is None; this vocabulary has tokens over several words",
        ),
        (lambda file: file["model"]["vocab"].pop("<0x41>"), "vocab is 'without <0x41>', not one with tokens"),
        (model(merges=["a c"]), "merges is 'a c', not made of tokens"),
    ],
)
def test_sentencepiece_refused(change: Change, message: str, tmp_path: Path) -> None:
    file = tokenizer_json(SPM)
    change(file)
    write_json(tmp_path / "tokenizer.json", file)
    with pytest.raises(EdgertError, match=message):
        keys_of(tmp_path, N_SPM)


@pytest.mark.parametrize(
    ("options", "generation", "message"),
    [
        ({"eos_token": "<none>"}, {}, "eos_token is '<none>', not a token of tokenizer.json"),
        ({"chat_template": 5}, {}, "chat_template is 5, not a string"),
        ({"chat_template": [{"name": "default"}]}, {}, "template is missing"),
        ({}, {"eos_token_id": [1, 2, 3]}, "GGUF has keys for three ids that end an answer"),
        ({}, {"eos_token_id": -1}, "eos_token_id is -1, not the id of a token"),
        ({}, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', not the id of a token"),
    ],
)
def test_other_files_refused(options: Any, generation: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EdgertError, match=message):
        keys_of(plain_folder(tmp_path, options=options), N_PLAIN, {}, generation)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"tokenizer.json: no such file; download it, or make it with transformers"
    ):
        keys_of(tmp_path, 5)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (plain_folder(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template.jinja: not UTF-8 at byte 0"):
        keys_of(tmp_path, N_PLAIN)
