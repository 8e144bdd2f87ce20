"""Texts that every extension is tried on, whatever else it is given: scripts, signs, spaces, code."""

_SCRIPTS = (
    "The quick brown fox jumps over the lazy dog; it's 3.14159 times o'clock, isn't it?",
    "Ελληνικά, русский язык, עברית, العربية, हिन्दी, বাংলা, தமிழ், ไทย, ქართული, አማርኛ, ᠮᠣᠩᠭᠣᠯ",
    "日本語のテキスト、カタカナとﾊﾝｶｸ。한국어 문장입니다. 漢字と한글",
    "Tiếng Việt, Türkçe, Ísland, naïve café, e\u0301 against é, ﬁ, ½, ①, Ⅷ, ㎏",
    "中文：“引号”、‘单引号’，《书名》——破折号……省略号。１２３ＡＢＣ！？；",
    "繁體中文與简体中文混排，㐀㑇𠀀𠮷𪚥，〇一二三，卍々〆",
    "English中文mixed混合text文本123数字，a中b文c。 中 文 ",
)
_SIGNS = (
    "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇨🇳©️∑∫√∞≠←→■□★☆♠♥",
    "\u200b\u200d\u2060\ufeff\u00a0\u3000\u2028\u2029\u0085\u00ad\ufffd\ufffe\ue000\U0010ffff",
    "".join(map(chr, range(1, 32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "\0",
    "a\0b中\0文",
    "<s></s><unk><0x41><|endoftext|><|im_start|>user[INST] [/INST]<pad>",
    "\u0301\u0301combining first, Z̸̖̀a̵͝l̴g̶o̷",
)
_SPACES = (
    "",
    " ",
    "\n",
    "\r\n\t \n",
    " leading",
    "trailing ",
    "  two  spaces  ",
    "\t\ttabs\t",
    "\n\n\n中文\n\n",
    " 中文",
    "中文 ",
    "　全角空格　",
)
_CODE = (
    "def f(x: int = 0, *args) -> dict[str, list]:\n    return {'a': [x**2 for _ in range(10)], \"b\": lambda y: y}\n",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; ++i)\n\t\tprintf(\"%d\\n\", i);\n\treturn 0;\n}\n",
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.x >= 1.5e-3 GROUP BY 1; -- comment\n",
    '{"key": [1, -2.5, null, true], "url": "https://example.org/a?b=c&d=%20#e"}',
    "<div class='x'>&nbsp;</div>\n$ git log --oneline | head -n 5 && echo $HOME\n0xDEADBEEF 0b1010 1_000_000",
)

BATTERY: tuple[str, ...] = (
    *_SCRIPTS,
    *_SIGNS,
    *_SPACES,
    *_CODE,
    *(" " * count for count in range(2, 70)),
    *(f"a{' ' * count}b" for count in range(2, 40)),
    *(f"{' ' * (4 * depth)}if x:\n" for depth in range(1, 12)),
    "\n" * 30,
    "-" * 100 + "=" * 77 + "." * 33,
    "".join(map(chr, range(32, 127))),
)
"""Encoded by old and new, decoded by new."""
