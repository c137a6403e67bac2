"""How a text is cut into words before byte-level BPE, by the name that `tokenizer.ggml.pre` gives.

The expressions are those of the models' own tokenizer files, which llama.cpp follows except for letters that are not
ASCII: where GPT-4o, Tekken and their kin begin a word anew at a capital, or keep combining marks with their letters, it
does not always. Adding a name is a row.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD, _SYMBOLS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+"
_BLANKS = r"|\s+(?!\S)|\s+"
_TAIL = r"|\s*[\r\n]+" + _BLANKS


def _words(digits: str, start: str = CONTRACTIONS + "|") -> str:
    """Letters, digits, symbols with the line ends behind them, white space: the shape that GPT-4 began with."""
    return f"{start}{_WORD}|{digits}|{_SYMBOLS}[\\r\\n]*{_TAIL}"


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL


def _cased(digits: str, behind: str, symbols_end: str = r"[\r\n/]*", but: str = "") -> str:
    """Words that begin anew where a lower-case letter is followed by a capital, as GPT-4o has them.

    behind: what may follow a word's letters. but: an intersection, which takes characters out of the letters.
    """
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{behind}" for letters in (f"{upper}*{lower}+", f"{upper}+{lower}*")
    )
    return f"{words}|{digits}|{_SYMBOLS}{symbols_end}{_TAIL}"


_GPT4O = _cased(r"\p{N}{1,3}", CONTRACTIONS + "?")

# Letters with case in the scripts that DeepSeek's tokenizer names: no Unicode property says the same.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_ASIAN,
)
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
)
_GROUPS_FROM_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # of three digits, as thousands are written
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _HAN_AND_KANA
)


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions applied one after the other, each to the pieces that the one before has left.

    What an expression matches becomes a piece, and so does what lies between two matches. whole_words: a piece
    that is a token is taken as it is, even where merges would not arrive at it. add_bos: the default of
    `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


def _named(names: str, *patterns: str, whole_words: bool = False, add_bos: bool = False) -> dict[str, PreTokenizer]:
    """The same pre-tokenizer under each of some names."""
    return dict.fromkeys(names.split(), PreTokenizer(patterns, whole_words, add_bos))


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **_named("gpt-2 olmo mpt phi-2 jais trillion gigachat a.x-4.0 exaone4 mellum granite-docling", _GPT2),
    # Llama 3, Falcon 3, LFM2
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA3, whole_words=True, add_bos=True
    ),
    **_named("glm4 glm5", _LLAMA3, whole_words=True),
    **_named("dbrx smaug-bpe chatglm-bpe", _LLAMA3),  # dbrx: Granite 4, OLMo 2
    **_named("minicpm5", r"\p{N}{1,3}", _words(r"\p{N}+"), whole_words=True),
    **_named(
        "jais-2",
        _LLAMA3.removesuffix(_BLANKS)
        + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
        + r"|\s{1}",
    ),
    # Qwen 2 to 3, Hunyuan-A13B
    **_named("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2 solar-open grok-2", _QWEN2),
    **_named("qwen35", _QWEN35),
    **_named("laguna", r"[^\n]+|[\n]+", _QWEN2),
    **_named("ufakzeka", _words(r"\p{N}", start="")),  # Turkish keeps what follows an apostrophe
    **_named("seed-coder", CONTRACTIONS + rf"|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+" + _TAIL),
    **_named(
        "exaone-moe",
        CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
        + _BLANKS,
    ),
    **_named(  # Ling, Ring
        "bailingmoe bailingmoe2 llada-moe",
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        + r"|\s*[\r\n]"
        + _BLANKS,
    ),
    # gpt-oss, Llama 4, MiniMax M2
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
    **_named("tiny_aya cohere2moe", r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O),
    **_named("youtu", _YOUTU_ASIAN, _cased(r"\p{N}", CONTRACTIONS + "?"), whole_words=True),
    **_named("tekken", _cased(r"\p{N}", ""), whole_words=True, add_bos=True),  # Mistral from Nemo on
    **_named(
        "kimi-k2",
        r"[\p{Han}]+|" + _cased(r"\p{N}{1,3}", CONTRACTIONS + "?", symbols_end=r"[\r\n]*", but=r"&&[^\p{Han}]"),
    ),
    # SmolLM, Granite 3 (refact), StarCoder 2, Command R
    **_named("smollm refact starcoder command-r codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT2),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    **_named("bloom poro-chat gpt3-finnish", _BLOOM),
    **_named("viking", _BLOOM, r"\p{N}"),
    **_named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **_named("afmoe", _GROUPS_FROM_RIGHT, _AFMOE_ASIAN, _DEEPSEEK_V3_WORDS + r"[\r\n]*" + _TAIL),
    **_named("deepseek-llm", *_DEEPSEEK_LLM, r"\p{N}+"),  # up to DeepSeek V2
    # As tokenizer.json has it: digit by digit. No token has two of them, so it is the same; the name is edgert's own.
    **_named("deepseek-llm-digits", *_DEEPSEEK_LLM, r"\p{N}"),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}"),
    **_named(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        r"\p{N}{1,3}",
        _HAN_AND_KANA,
        _DEEPSEEK_V3_WORDS + r"[\r\n]*" + _TAIL,
    ),
    **_named("spark2_5", r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_V3_WORDS + r"|[\r\n]" + _BLANKS, r"\p{N}"),
}
