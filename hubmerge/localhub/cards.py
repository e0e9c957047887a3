"""Model cards: their YAML front matter, and the checks the Hub makes before it accepts one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hubmerge.localhub.oauth import SCOPES

_LICENSE_TEXT = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_TEXT.split())
RELATIONS = frozenset(("adapter", "finetune", "merge", "quantized"))
SDKS = ("gradio", "docker", "static", "streamlit")
_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
_MAX_DESCRIPTION_CHARS = 60
_MAX_OAUTH_MINUTES = 30 * 24 * 60
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(\r?\n|\Z)", re.S | re.M)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.A)


@dataclass(slots=True)
class CardReport:
    """What is wrong with a card: errors stop the upload, warnings do not."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def front_matter(text: str) -> str | None:
    """The YAML between the leading ``---`` lines; ``None`` without such a block."""
    match = _FRONT_MATTER.match(text)
    return match[1] if match else None


def body(text: str) -> str:
    """What follows the front matter."""
    return _FRONT_MATTER.sub("", text, count=1)


def metadata(text: str | None) -> dict[str, Any]:
    """The card's metadata as JSON-ready values; empty if absent or unreadable."""
    block = front_matter(text or "")
    try:
        loaded = YAML(typ="safe", pure=True).load(block) if block else None
    except YAMLError:
        return {}
    return {str(key): _jsonable(value) for key, value in loaded.items()} if isinstance(loaded, dict) else {}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def validate(text: str, kind: str) -> CardReport:
    """Check a card as the Hub's ``validate-yaml`` does.

    Args:
        text: The whole README.
        kind: Repository type.
    """
    report = CardReport()
    block = front_matter(text)
    if block is None or not block.strip():
        report.warnings.append("empty or missing yaml metadata in repo card")
        return report
    try:
        data = YAML(typ="safe", pure=True).load(block)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 2}, column {mark.column + 1})" if mark else ""
        report.errors.append(f"YAML parse error: {getattr(error, 'problem', None) or error}{where}")
        return report
    if not isinstance(data, dict):
        report.errors.append("YAML metadata must be a mapping of keys to values")
        return report
    _check_license(data, report)
    if kind == "model":
        _check_model(data, report)
    if kind == "space":
        _check_space(data, report)
    for key in ("tags", "datasets", "metrics", "language"):
        if key in data:
            _check_strings(key, data[key], report)
    return report


def _strings(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_strings(key: str, value: Any, report: CardReport) -> None:
    if key in ("tags", "datasets", "metrics") and not isinstance(value, list):
        report.errors.append(f'"{key}" must be an array')
    elif not all(isinstance(item, str) for item in _strings(value)):
        report.errors.append(f'"{key}" must contain only strings (quote values such as 1.0)')


def _check_license(data: dict[str, Any], report: CardReport) -> None:
    for value in _strings(data.get("license", [])):
        if value not in LICENSES:
            report.errors.append(f'"license" must be one of the identifiers the Hub knows, not {value!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        report.warnings.append('"license: other" should come with "license_name" and "license_link"')


def _check_model(data: dict[str, Any], report: CardReport) -> None:
    for value in _strings(data.get("base_model", [])):
        if not isinstance(value, str) or not _REPO_ID.fullmatch(value):
            report.errors.append(f'"base_model" with value {value!r} is not a valid model id')
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        report.errors.append(f'"base_model_relation" must be one of {", ".join(sorted(RELATIONS))}, not {relation!r}')
    for key in ("pipeline_tag", "library_name", "new_version"):
        if key in data and not isinstance(data[key], str):
            report.errors.append(f'"{key}" must be a string')
    index = data.get("model-index")
    if index is None:
        return
    if not isinstance(index, list):
        report.errors.append('"model-index" must be an array')
        return
    for number, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            report.errors.append(f'"model-index[{number}].name" is required')
        elif not isinstance(model.get("results"), list):
            report.errors.append(f'"model-index[{number}].results" is required')


def _check_space(data: dict[str, Any], report: CardReport) -> None:
    if data.get("sdk") not in SDKS:
        report.errors.append(f'"sdk" must be one of {", ".join(SDKS)}')
    for key in ("title", "emoji", "sdk_version", "python_version", "app_file", "suggested_hardware"):
        if key in data and not isinstance(data[key], str):
            report.errors.append(f'"{key}" must be a string (quote values such as 3.10)')
    for key in ("colorFrom", "colorTo"):
        if key in data and data[key] not in _COLORS:
            report.errors.append(f'"{key}" must be one of {", ".join(_COLORS)}')
    description = data.get("short_description", "")
    if not isinstance(description, str) or len(description) > _MAX_DESCRIPTION_CHARS:
        report.errors.append(f'"short_description" must have at most {_MAX_DESCRIPTION_CHARS} characters')
    if not isinstance(data.get("hf_oauth", False), bool):
        report.errors.append('"hf_oauth" must be true or false')
    unknown = [str(scope) for scope in _strings(data.get("hf_oauth_scopes", [])) if scope not in SCOPES]
    if unknown:
        report.errors.append(f'"hf_oauth_scopes" has unknown ones: {", ".join(unknown)}')
    minutes = data.get("hf_oauth_expiration_minutes", 1)
    if not isinstance(minutes, int) or not 1 <= minutes <= _MAX_OAUTH_MINUTES:
        report.errors.append(f'"hf_oauth_expiration_minutes" must be from 1 to {_MAX_OAUTH_MINUTES}')
