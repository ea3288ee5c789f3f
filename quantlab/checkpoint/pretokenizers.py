r"""How a text is cut into words before byte-level BPE merges: llama.cpp's names, and the patterns behind each.

`tokenizer.ggml.pre` of a GGUF file is one of these names. The patterns are those that llama.cpp applies
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp), which here and there is not what the model's
own tokenizer does: of case it knows ASCII's only. They are written in Oniguruma's syntax, the one of the `tokenizers`
library, where `\d` and `$` mean something else than in C++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

# What most patterns are made of.
CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LINE_ENDS = r"\s*[\r\n]+"
SPACES = r"\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
THREE_DIGITS = r"\p{N}{1,3}"
PUNCTUATED_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
KANJI_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
IDEOGRAPHS_AND_HANGUL = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"


def _words(
    numbers: str,
    *,
    contraction: str = CONTRACTION,
    word: str = WORD,
    signs: str = r"[^\s\p{L}\p{N}]",
    end: str = r"[\r\n]*",
) -> str:
    """The family of GPT-4's pattern; `end` is what may follow signs."""
    parts = [contraction, word, numbers, f" ?{signs}+{end}", LINE_ENDS, SPACES]
    return "|".join(part for part in parts if part)


def _cased_words(numbers: str, *, contraction: str = "", capitals: str, lower: str) -> str:
    """The family of GPT-4o's pattern, where a word ends before a capital that follows a lower-case letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    word = f"{start}{capitals}*{lower}+{contraction}|{start}{capitals}+{lower}*{contraction}"
    return _words(numbers, contraction="", word=word, end=r"[\r\n/]*")


ASCII_CASES = {"capitals": r"[\p{L}&&[^a-z]]", "lower": r"[\p{L}&&[^A-Z]]"}
ASCII_CASES_AND_MARKS = {"capitals": r"[\p{L}\p{M}&&[^a-z]]", "lower": r"[\p{L}\p{M}&&[^A-Z]]"}
CASES = {"capitals": r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", "lower": r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"}
OPTIONAL_CONTRACTION = f"{CONTRACTION}?"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _words(THREE_DIGITS)
QWEN2 = _words(DIGIT)
GPT4O = _cased_words(THREE_DIGITS, contraction=OPTIONAL_CONTRACTION, **CASES)
MARKED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{OPTIONAL_CONTRACTION}"
FULL_WIDTH_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
# llama.cpp makes all spaces ASCII's for C++, and so none is in the range of the ideographs.
DEEPSEEK_IDEOGRAPHS = f"[{IDEOGRAPHS_AND_HANGUL}&&[^\\s]]+"
LINES = r"[^\n]+|\n+"
# Digits are counted from the right, and the first group of a number stays with what precedes it.
GROUPED_DIGITS = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
WORD_WITH_MARKS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK3 = f"{PUNCTUATED_WORD}|{WORD_WITH_MARKS}| ?[\\p{{P}}\\p{{S}}]+[\\r\\n]*|{LINE_ENDS}|{SPACES}"
SPARK = f"{PUNCTUATED_WORD}|{WORD_WITH_MARKS}| ?[\\p{{P}}\\p{{S}}]+|[\\r\\n]|{SPACES}"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# Letters of the alphabets that know case, as DeepSeek's first tokenizer lists them.
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
ASIAN_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{KANJI_AND_KANA}"
)
HALVING_SPACES = "|".join([rf"\s{{{1 << n}}}(?!\S)" for n in range(9, 1, -1)] + [r"\s{1,2}(?!\S)", r"\s{1}"])


@dataclass(frozen=True)
class PreTokenizer:
    """What a name of `tokenizer.ggml.pre` stands for.

    Each pattern cuts the pieces that the one before left: its matches, and what is between them. `ignore_merges`: a
    piece that is a token is that token, whatever the merges make of it. `adds_bos`: the start token is put before a
    text unless the file says otherwise. `bytewise`: pieces are written in GPT-2's letters for bytes, else as they are.
    `originals`: the patterns of models that are known under the name, where they are not quite llama.cpp's.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    bytewise: bool = True
    originals: tuple[tuple[str, ...], ...] = ()

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` form."""
        from tokenizers import Regex, pre_tokenizers

        patterns, byte_level = self.patterns, []
        if self.bytewise:  # the library has GPT-2's pattern built in
            ends_as_gpt2 = patterns[-1:] == (GPT2,)
            byte_level = [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=ends_as_gpt2)]
            patterns = patterns[:-1] if ends_as_gpt2 else patterns
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns] + byte_level
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


# Rows of names that mean the same; the first is the one that we write.
ROWS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (
        (
            "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
            "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion",
            "granite-docling",
        ),
        PreTokenizer((GPT2,)),
    ),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
    ),
    (("glm4", "glm5"), PreTokenizer((LLAMA3,), ignore_merges=True)),
    (("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizer((LLAMA3,))),
    (
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "grok-2", "solar-open"),
        PreTokenizer((QWEN2,)),
    ),
    (
        ("qwen35",),
        PreTokenizer((_words(DIGIT, word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", signs=r"[^\s\p{L}\p{M}\p{N}]"),)),
    ),
    (
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreTokenizer((DIGIT, GPT2)),
    ),
    (
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        PreTokenizer(
            (_cased_words(THREE_DIGITS, contraction=OPTIONAL_CONTRACTION, **ASCII_CASES),), originals=((GPT4O,),)
        ),
    ),
    (
        ("tekken",),
        PreTokenizer(
            (_cased_words(DIGIT, **ASCII_CASES),),
            ignore_merges=True,
            adds_bos=True,
            originals=((_cased_words(DIGIT, **CASES),),),
        ),
    ),
    (
        ("granite-embed-multi-97m",),
        PreTokenizer(
            (_cased_words(THREE_DIGITS, contraction=OPTIONAL_CONTRACTION, **ASCII_CASES_AND_MARKS),),
            ignore_merges=True,
            originals=((GPT4O,),),
        ),
    ),
    (
        ("tiny_aya", "cohere2moe"),
        PreTokenizer(
            (GROUPED_DIGITS, _words(THREE_DIGITS, contraction="", word=MARKED_WORD, end=r"[\r\n/]*")),
            originals=((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O),),
        ),
    ),
    (
        ("deepseek-llm",),
        PreTokenizer(
            (
                r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", FULL_WIDTH_SIGNS.replace("\u3000", "\u3001"), r"\s+\z",
                DEEPSEEK_IDEOGRAPHS, r"\p{N}+",
            ),
            originals=(
                (
                    r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", FULL_WIDTH_SIGNS, r"\s+$",
                    f"[{IDEOGRAPHS_AND_HANGUL}]+", DIGIT,
                ),
            ),
        ),
    ),
    (
        ("deepseek-coder",),
        PreTokenizer(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_IDEOGRAPHS, DIGIT),
            originals=((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{IDEOGRAPHS_AND_HANGUL}]+", DIGIT),),
        ),
    ),
    (
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        PreTokenizer((THREE_DIGITS, KANJI_AND_KANA, DEEPSEEK3)),
    ),
    (("spark2_5",), PreTokenizer((THREE_DIGITS, KANJI_AND_KANA, SPARK, DIGIT))),
    (
        ("falcon",),
        PreTokenizer(
            (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
            originals=((r"[\p{P}$+<=>^~|`]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),),
        ),
    ),
    (("default",), PreTokenizer((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (("poro-chat", "bloom", "gpt3-finnish"), PreTokenizer((BLOOM,))),
    (("viking",), PreTokenizer((BLOOM, DIGIT))),
    (("jais-2",), PreTokenizer((LLAMA3.removesuffix(SPACES) + HALVING_SPACES,))),
    (
        ("youtu",),
        PreTokenizer(
            (YOUTU_SCRIPTS, _words(DIGIT, contraction="", word=MARKED_WORD, end=r"[\r\n/]*")), ignore_merges=True
        ),
    ),
    (
        ("exaone-moe",),
        PreTokenizer(
            (
                rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{SPACES}",
            )
        ),
    ),
    (
        ("chameleon",),
        PreTokenizer(
            (
                "<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", DIGIT, r"[\p{P}!-/:-@\[-`{-~]", GPT2,
            ),
            adds_bos=True,
        ),
    ),
    (("superbpe",), PreTokenizer((r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"))),
    (
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        PreTokenizer(
            (
                rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{WORD}|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{SPACES}",
            )
        ),
    ),
    (("seed-coder",), PreTokenizer((_words(DIGIT, signs=r"[^\s\p{L}\p{N}\r\n]", end=""),))),
    (("ufakzeka",), PreTokenizer((_words(DIGIT, contraction=""),))),
    (("afmoe",), PreTokenizer((GROUPED_DIGITS, ASIAN_SCRIPTS, DEEPSEEK3))),
    (("laguna",), PreTokenizer((LINES, QWEN2))),
    (("minicpm5",), PreTokenizer((THREE_DIGITS, _words(r"\p{N}+")), ignore_merges=True)),
    (("gemma4", "granite-embed-multi-311m"), PreTokenizer((LINES,), adds_bos=True, bytewise=False)),
    (("sarvam-moe",), PreTokenizer((LINES,), bytewise=False)),
)  # fmt: skip
PRETOKENIZERS = {name: row for names, row in ROWS for name in names}
