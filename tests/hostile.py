"""Texts that strangers might put where they hope to be taken for YAML, Markdown, HTML, a template or something else."""

from __future__ import annotations

YAML = (
    "---\nlicense: mit\n---", "\n---\n# hijacked", "...", "a: b", "'", '"', "\\", "no", "null", "0x1f", "1e3",
    "2024-01-01", "~", "!!python/object/apply:os.system [id]", "&a *a", "%YAML 9", "@x", "{a: b}", "[a, b]",
    "- a\n- b", "a: |\n  b", "? a\n: b", "a #b", "<<: *x", "license: mit", "'''", '"""', "\n...\n---\nlicense: mit\n",
)  # fmt: skip
MARKDOWN = (
    "```\n# out", "~~~", "`code`", "``", "|||| a | b", "x\n| a | b |\n| --- | --- |", "![a](https://e.example/x.png)",
    "[a]: https://e.example", "](https://e.example)", "**bold** __bold__ ~~gone~~ $x$", "# heading", "- item",
    "1. item", "> quote", "setext\n===", "* * *", "\t code", "http://e.example/<x>", "\\`x\\`", "*", "_a_ a_b",
    "<https://e.example>", "| \\| |", "[a]\n\n[a]: https://e.example/b", "![][a]\n\n[a]: https://e.example/c.png",
    "x](https://e.example) [y", "a|b|c\n\n# Owned", "`code` ![i](https://e.example/p.png)", "$$x$$",
    "[^1]\n\n[^1]: y", "- [ ] a", "1) a", "+ a", "a\n---", "a  \nb", "a\\\nb", "<a@e.example>", "&#96;&#96;&#96;",
    "```html\n<b>\n```\n\n<b>", "    indented\n\nout", ">>> a\n> b", "- ", "#", "####### seven", "[a](<b c> 'd')",
    "![a](data:image/svg+xml;base64,PHN2Zz4=)",
)  # fmt: skip
HTML = (
    "<script>alert(1)</script>", "<!--", "-->", "</details><details>", "<img src=x onerror=y>",
    "[a](javascript:alert(1))", "&lt;b&gt; &#60;b&#62;", "<a href='x'>", "<svg onload=alert(1)>",
    "<iframe src='//e.example'>", "<style>*{}</style>", "</td></tr></table>", "<![CDATA[x]]>", "<?php x ?>",
    "<!DOCTYPE html>", "<b\nonclick=x>y</b>", "[a](JaVaScRiPt:x)", "[a](&#106;avascript:x)", "[a](vbscript:x)",
    "[a](data:text/html,<script>)", "<javascript:alert(1)>", "<math><mi//xlink:href>",
    "<form action='//e.example'><input>", "<meta http-equiv=refresh>", "<base href='//e.example'>",
    "</code></pre><script>", "<x", "</", "&", "&amp", '<a\thref="javascript:x">', "<%= x %>",
)  # fmt: skip
TEMPLATES = (
    "{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{# gone", "{% raw %}", "{{", "%}",
    "{% endblock %}", "{{ facts.recipe }}", "${7*7}", "{{ range(10**9) }}", "# for x in y",
)  # fmt: skip
CHARACTERS = (
    "a\r\nb\rc", "\u202egnp.exe", "zero\u200bwidth\ufeff", "\u2028line\u2029par", "nul\x00bell\x07esc\x1b[31m",
    "\ud800", "é" * 3000, " ", "\U000e0041", "\u2066a\u2069", "\u0301" * 50, "a" * 20_000, "\ufffe\uffff",
    "\x85next", "\xa0", "\u3000", "\u200d", "[" * 2000, "`" * 999, "*" * 999, "<" * 2000, "| " * 1000, "\n" * 500,
    "\t" * 300, "﷽" * 200, "\x7f\x9b",
)  # fmt: skip
ELSEWHERE = (
    "$(id) `id` ; id", "'; drop table x; --", "../../etc/passwd", "a\nb: c", "\r\nX-Header: y", "%00", "C:\\x", "~/x",
    "-rf", "\\", "${IFS}",
)  # fmt: skip
TEXTS = tuple(dict.fromkeys((*YAML, *MARKDOWN, *HTML, *TEMPLATES, *CHARACTERS, *ELSEWHERE)))
