"""Path patterns of .gitignore and .gitattributes: the subset that decides upload modes."""

from __future__ import annotations

import re

DEFAULT_GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
        "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt",
        "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar", "*.tflite", "*.tgz", "*.wasm",
        "*.xz", "*.zip", "*.zst", "*tfevents*",
    )
)  # fmt: skip


def _pattern_regex(pattern: str) -> re.Pattern[str]:
    """Translate one pattern; matches the path itself or any folder above it."""
    anchored = "/" in pattern.rstrip("/")
    folder_only = pattern.endswith("/")
    body = pattern.strip("/")
    out, i = "", 0
    while i < len(body):
        if body.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif body.startswith("/**", i) and i + 3 == len(body):
            out, i = out + "/.*", i + 3
        elif body[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif body[i] == "?":
            out, i = out + "[^/]", i + 1
        elif body[i] == "[" and (end := body.find("]", i + 2)) > 0:
            inner = body[i + 1 : end].replace("\\", "\\\\")
            out, i = out + "[" + ("^" + inner[1:] if inner[0] == "!" else inner) + "]", end + 1
        elif body[i] == "\\" and i + 1 < len(body):
            out, i = out + re.escape(body[i + 1]), i + 2
        else:
            out, i = out + re.escape(body[i]), i + 1
    return re.compile(("" if anchored else "(?:.*/)?") + out + ("/.*" if folder_only else "(?:/.*)?") + r"\Z", re.S)


class IgnoreRules:
    """A .gitignore file; later lines win, ``!`` takes a path back in."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for raw in text.splitlines():
            line = raw.rstrip()
            if not line or line.startswith("#"):
                continue
            negated = line.startswith("!")
            self._rules.append((not negated, _pattern_regex(line[1:] if negated else line)))

    def matches(self, path: str) -> bool:
        """Whether ``path`` is ignored."""
        ignored = False
        for verdict, regex in self._rules:
            if regex.match(path):
                ignored = verdict
        return ignored


class LfsRules:
    """The ``filter=lfs`` lines of a .gitattributes file; later lines win."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for raw in text.splitlines():
            words = raw.split()
            if len(words) < 2 or words[0].startswith("#"):
                continue
            for word in words[1:]:
                if word == "filter=lfs" or word in ("-filter", "!filter"):
                    self._rules.append((word == "filter=lfs", _pattern_regex(words[0])))

    def matches(self, path: str) -> bool:
        """Whether ``path`` is to be stored as a large file whatever its size."""
        large = False
        for verdict, regex in self._rules:
            if regex.match(path):
                large = verdict
        return large
