"""Turns pydantic's errors into one line that names the key and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from fastpo.config.fields import Section, discriminator_of, keys_of, sections_of

ELSEWHERE = {
    "learning_rate": "train.optim.lr",
    "lr_scheduler": "train.optim.schedule",
    "lr_scheduler_type": "train.optim.schedule",
    "lr_warmup_steps": "train.optim.warmup_steps",
    "optimizer": "train.optim.name",
    "beta_dpo": "train.objective.beta",
    "loss_type": "train.objective.name",
    "train_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "mixed_precision": "train.precision",
    "max_train_steps": "train.max_steps",
    "num_train_epochs": "train.epochs",
    "checkpointing_steps": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every",
    "checkpoints_total_limit": "train.keep_checkpoints",
    "report_to": "train.trackers",
    "tracker": "train.trackers",
    "lora_rank": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "pretrained_model_name_or_path": "model.path",
    "dataset_name": "data.path",
}
"""Keys as diffusers' scripts, TRL and peft call them, and ours."""


def explain(error: Any, root: type[Section]) -> str:
    """Turns one pydantic error into `key: complaint`, with the nearest valid key if unknown."""
    location = [part for part in error["loc"] if isinstance(part, str | int)]
    names = _strip_tags(location, root)
    key = ".".join(map(str, names)) or "config"
    if error["type"] == "extra_forbidden":
        near = _nearest(names, _valid_keys(location[:-1], root), root)
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
    if error["type"] in ("model_type", "model_attributes_type"):
        keys = _valid_keys(location, root) or _tags(location, root)
        return f"{key}: this is a section with keys such as {_listed(keys)}, got {_shown(error)}"
    if error["type"] == "union_tag_not_found":
        return f"missing key {key}.{error['ctx']['discriminator'].strip(chr(39))}"
    if error["type"] == "missing":
        return f"missing key {key}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    got = error.get("input")
    return f"{key}: {message}" + (f", got {got!r}" if not isinstance(got, dict) else "")


def _nearest(names: Sequence[str | int], siblings: Sequence[str], root: type[Section]) -> str:
    """The full name of the key that was meant; empty if nothing is near.

    Another trainer's name is looked up first, then a key of that very name in another section,
    then one of the same section that is spelled alike.
    """
    name, above = str(names[-1]), [str(part) for part in names[:-1]]
    alike = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if alike:
        return ".".join([*above, alike[0]])
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    same = {key for key, _ in keys_of(root) if key.rpartition(".")[2] == name}
    below = sorted(key for key in same if key.startswith(".".join([*above, ""])))
    if below or same:
        return (below or sorted(same))[0]
    alike = difflib.get_close_matches(name, siblings, n=1, cutoff=0.4)
    return ".".join([*above, alike[0]]) if alike else ""


def _tags(location: Sequence[str | int], root: type[Section]) -> list[str]:
    """The key that tells the sections of a union apart, as a list; empty elsewhere."""
    node: Any = root
    for part in location:
        node = node.get(part) if isinstance(node, dict) else _child(node, part)
    sections = list(node.values()) if isinstance(node, dict) else []
    return list(sections[0].model_fields)[:1] if sections else []


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _shown(error: Any) -> str:
    return repr(error.get("input"))[:80]


def _strip_tags(location: Sequence[str | int], root: type[Section]) -> list[str | int]:
    """Drops the union tags that pydantic puts into a location (`objective.dpo.beta`)."""
    names: list[str | int] = []
    node: Any = root
    for part in location:
        if isinstance(node, dict):
            node = node.get(part)
            continue
        names.append(part)
        node = _child(node, part)
    return names


def _valid_keys(location: Sequence[str | int], root: type[Section]) -> list[str]:
    """Returns the keys that are allowed at a pydantic location."""
    node: Any = root
    for part in location:
        node = node.get(part) if isinstance(node, dict) else _child(node, part)
    return list(node.model_fields) if isinstance(node, type) else []


def _child(node: Any, part: str | int) -> Any:
    """The section, or the sections by tag, that a key holds; None for a plain value."""
    if not (isinstance(node, type) and issubclass(node, Section)):
        return None
    if isinstance(part, int):  # one of a list of sections
        return node
    field = node.model_fields.get(str(part))
    if field is None:
        return None
    sections, tag = sections_of(field), discriminator_of(field)
    if tag:
        return {get_args(s.model_fields[tag].annotation)[0]: s for s in sections}
    return sections[0] if sections else None
