"""What a small MoE is made of besides its weights: sizes, tokenizer, training text, and the GGUF it is written as.

The file is a `qwen3moe` that edgert and llama.cpp load: matrices F16, norms and routers F32, the head tied to
the embedding. Needs numpy, gguf and, to train a vocabulary, tokenizers; knows nothing about how weights are trained.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from upcycle_data import Conversation, Exclusion, Source, read_chat, read_text

from edgert.errors import OptionError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How text is split before merging where tokenizer.ggml.pre is "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARTICLE_MARK = re.compile(r"</?doc\b[^>]*>\n?")  # around the articles of a Wikipedia extract
HELD_OUT_PART = 0.01  # of the documents of each source


@dataclass(frozen=True)
class Sizes:
    """The model's dimensions; every row of a matrix is a multiple of 256 long, as K-quants need it."""

    n_layer: int = 4
    d_model: int = 256
    n_head: int = 4
    n_kv_head: int = 2
    d_head: int = 64
    n_expert: int = 16
    top_k: int = 4
    d_expert: int = 256
    n_vocab: int = 4096
    n_context: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file with its shape, slowest dimension first."""
        d, q, kv = self.d_model, self.n_head * self.d_head, self.n_kv_head * self.d_head
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,),
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_q_norm": (self.d_head,),
            "attn_k_norm": (self.d_head,),
            "attn_output": (d, q),
            "ffn_norm": (d,),
            "ffn_gate_inp": (self.n_expert, d),
            "ffn_gate_exps": (self.n_expert, self.d_expert, d),
            "ffn_up_exps": (self.n_expert, self.d_expert, d),
            "ffn_down_exps": (self.n_expert, d, self.d_expert),
        }
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, d), "output_norm.weight": (d,)}
        for layer in range(self.n_layer):
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary: tokens in the order of their ids, the special ones first, and merges."""

    tokens: list[str]
    merges: list[str]

    @classmethod
    def train(cls, texts: Iterable[str], n_vocab: int) -> Vocabulary:
        """The `n_vocab` tokens that byte-pair encoding finds in `texts`."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = _splitter()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=n_vocab, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return cls(sorted(model["vocab"], key=model["vocab"].__getitem__), merges)

    def tokenizer(self) -> Tokenizer:
        """The encoder that trains and encodes as readers of the file do."""
        from tokenizers import Tokenizer, models

        ids = {token: i for i, token in enumerate(self.tokens)}
        pairs = [tuple(merge.split(" ")) for merge in self.merges]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
        tokenizer.pre_tokenizer = _splitter()
        tokenizer.add_special_tokens(list(SPECIAL))
        return tokenizer


def _splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True)
class Texts:
    """The documents of a folder, as text: what is trained on, and what is held out, by source."""

    training: list[str] = field(default_factory=list)
    held_out: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, exclude: Sequence[Path] = ()) -> Texts:
        """All text (*.utf8, *.txt) and conversations (*.json, *.jsonl) of `folder`, less what occurs in `exclude`."""
        texts, exclusion = cls(), Exclusion(exclude)
        readers = {".utf8": read_text, ".txt": read_text, ".json": read_chat, ".jsonl": read_chat}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix in readers:
                texts._add(path.name, readers[path.suffix](path, exclusion))
        if not texts.training:
            raise OptionError(f"--data {folder}: holds no *.utf8, *.txt, *.json or *.jsonl with text to train on")
        return texts

    def _add(self, name: str, source: Source) -> None:
        documents = [text for document in source.documents if (text := as_text(document)).strip()]
        n_held_out = max(1, round(len(documents) * HELD_OUT_PART))
        self.training.extend(documents[:-n_held_out])
        self.held_out[name] = documents[-n_held_out:]


def as_text(document: str | Conversation) -> str:
    """A block of text without article marks, or a conversation as the chat template writes it."""
    if isinstance(document, str):
        return ARTICLE_MARK.sub("", document)
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in document)


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids, each ended by END_OF_TEXT."""

    documents: list[np.ndarray]

    @classmethod
    def encode(cls, texts: Sequence[str], vocabulary: Vocabulary) -> Corpus:
        """Encode `texts`."""
        end = vocabulary.tokens.index(END_OF_TEXT)
        encoded = vocabulary.tokenizer().encode_batch(list(texts))
        return cls([np.array([*each.ids, end], np.int64) for each in encoded])

    @property
    def n_tokens(self) -> int:
        """The length of one epoch."""
        return sum(map(len, self.documents))

    def batch(self, step: int, n_tokens: int, n_row: int, seed: int) -> np.ndarray:
        """The rows (n_tokens // n_row, n_row) of training step `step`.

        Each epoch cuts another order of documents into rows, and shuffles those: neighbours of one document would
        make a step's loss, and its use of experts, that document's.
        """
        epoch, place = divmod(step, self.n_tokens // n_tokens)
        random, n_rows = np.random.default_rng([seed, epoch]), n_tokens // n_row
        stream = np.concatenate([self.documents[i] for i in random.permutation(len(self.documents))])
        order = random.permutation(len(stream) // n_row)[place * n_rows : (place + 1) * n_rows]
        return stream[: len(stream) // n_row * n_row].reshape(-1, n_row)[order]

    def rows(self, n_row: int) -> np.ndarray:
        """All documents in order as rows (n_rows, n_row); a ragged end is left out."""
        stream = np.concatenate(self.documents)
        return stream[: len(stream) // n_row * n_row].reshape(-1, n_row)


def write(path: Path, sizes: Sizes, vocabulary: Vocabulary, weights: Mapping[str, np.ndarray], about: str) -> None:
    """Write the GGUF `path`, aside first; `weights` are float32 under their GGUF names, as Sizes.shapes lists them."""
    aside = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(aside, "qwen3moe")
    writer.add_type("model")
    writer.add_name("Small MoE")
    writer.add_description(about)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_sizes(writer, sizes)
    _write_vocabulary(writer, vocabulary)
    for name, shape in sizes.shapes().items():
        assert weights[name].shape == shape, (name, weights[name].shape, shape)
        exact = len(shape) == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, np.ascontiguousarray(weights[name], np.float32 if exact else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, path)


def _write_sizes(writer: gguf.GGUFWriter, sizes: Sizes) -> None:
    writer.add_block_count(sizes.n_layer)
    writer.add_context_length(sizes.n_context)
    writer.add_embedding_length(sizes.d_model)
    writer.add_feed_forward_length(sizes.d_expert)
    writer.add_head_count(sizes.n_head)
    writer.add_head_count_kv(sizes.n_kv_head)
    writer.add_key_length(sizes.d_head)
    writer.add_value_length(sizes.d_head)
    writer.add_rope_freq_base(sizes.rope_base)
    writer.add_layer_norm_rms_eps(sizes.norm_eps)
    writer.add_vocab_size(sizes.n_vocab)
    writer.add_expert_count(sizes.n_expert)
    writer.add_expert_used_count(sizes.top_k)
    writer.add_expert_feed_forward_length(sizes.d_expert)


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    tokens = vocabulary.tokens
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokens.index(END_OF_TEXT))
    writer.add_eos_token_id(tokens.index(TURN_END))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
