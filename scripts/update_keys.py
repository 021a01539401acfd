"""Writes docs/keys.md, every key of the configuration, from the sections in `fastpo/config/`.

python scripts/update_keys.py
"""

from pathlib import Path
from typing import Any

from fastpo.config import Config
from fastpo.config.fields import keys_of
from fastpo.system.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"
HEAD = """\
# Every key of the configuration

Written by `python scripts/update_keys.py` from the sections in `fastpo/config/`. Any key can be
changed on the command line: `--set train.optim.lr=1e-6`. The last column says what another value
makes useless: `cache` the prepared latents and texts, and all that is computed from them;
`reference` the cached errors of the reference; `run` a checkpoint, which is resumed with the same
value only (`--resume --change` takes some others); `images` what `fastpo evaluate` has sampled.
"""
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
KINDS = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`"}


def page() -> str:
    """The page's text."""
    schema = Config.model_json_schema()
    useless = {key: ", ".join(sorted(results)) or "-" for key, results in keys_of(Config)}
    return HEAD + "".join(_section(schema, schema, "", useless))


def _section(
    schema: dict[str, Any], section: dict[str, Any], prefix: str, useless: dict[str, str]
) -> list[str]:
    """The section's table, then those of the sections in it."""
    names, rows, below = {}, [], []
    for name, field in section["properties"].items():
        inner = _sections(schema, field)
        for one in inner:
            below += _section(schema, one, f"{prefix}{name}.", useless)
        tag = "const" in field
        if not inner and not tag:
            cells = (f"`{name}`", _values(field), _default(field), field.get("description", ""))
            text = " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
            rows.append(f"| {text} | {useless[prefix + name]} |\n")
        elif tag:
            names[name] = field["const"]
    if not rows and not names:
        return below
    chosen = "".join(f", `{name}: {value}`" for name, value in names.items())
    title = f"`{prefix.rstrip('.')}`" if prefix else "Outside of all sections"
    out = [f"\n## {title}{chosen}\n\n"]
    if prefix:
        out.append(section["description"].replace("\n", " ") + "\n")
    if rows:
        out.append("\n" if prefix else "")
        out.append("| key | value | default | meaning | makes useless |\n|---|---|---|---|---|\n")
    return [*out, *rows, *below]


def _sections(schema: dict[str, Any], field: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that a key may hold."""
    if "$ref" in field:
        return [schema["$defs"][field["$ref"].rsplit("/", 1)[1]]]
    parts = [
        *field.get("oneOf", []),
        *field.get("anyOf", []),
        *([field["items"]] if "items" in field else []),
    ]
    return [section for part in parts for section in _sections(schema, part)]


def _values(field: dict[str, Any]) -> str:
    """What a key may be set to."""
    if "anyOf" in field:
        parts = [part for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(_values(part) for part in parts)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array":
        parts = field.get("prefixItems")
        return f"{len(parts)} numbers" if parts else f"list: {_values(field['items'])}"
    if field["type"] == "object":
        return f"mapping of text to: {_values(field['additionalProperties'])}"
    if field["type"] == "string":
        return "path" if field.get("format") == "path" else "text"
    bounds = [text.format(field[key]) for key, text in BOUNDS.items() if key in field]
    return ", ".join((KINDS[field["type"]], *bounds))


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "`{}`" if field.get("type") == "object" else "required"
    value = field["default"]
    if isinstance(value, list):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return (
        "none" if value is None else f"`{str(value).lower() if value in (True, False) else value}`"
    )


if __name__ == "__main__":
    write_text(PAGE, page())
