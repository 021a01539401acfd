"""docs/keys.md is what the sections say."""

import runpy
from pathlib import Path

from fastpo.config import Config

SCRIPT = Path(__file__).parents[2] / "scripts" / "update_keys.py"


def test_the_page_of_keys_is_current():
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["page"](), "run python scripts/update_keys.py"


def test_every_key_is_described():
    schema = Config.model_json_schema()
    undescribed = {
        f"{section}.{name}"
        for section, content in {**schema["$defs"], "Config": schema}.items()
        for name, key in content["properties"].items()
        if not {"description", "$ref", "const", "oneOf"} & key.keys() and _is_plain(key)
    }
    assert undescribed == set(), 'write """...""" below the key'


def _is_plain(key):
    return not any("$ref" in part or "oneOf" in part for part in key.get("anyOf", []))
