"""The whole configuration: read from YAML, changed by `--set a.b=c`, written, laid out flat.

Unknown or ill-typed keys are refused with the key's full name and the nearest valid one. The
resolved configuration is saved into the run folder and into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ValidationError, model_validator

from fastpo.config.data import DataConfig
from fastpo.config.fields import Section, Seed, decides, with_words
from fastpo.config.messages import explain
from fastpo.config.sections import EvaluateConfig, ModelConfig, PrepareConfig
from fastpo.config.train import TrainConfig
from fastpo.config.train_checks import check_held_out, check_lora_start
from fastpo.errors import ConfigError
from fastpo.system.json_text import read_bounded

MOST_BYTES = 1 << 18
"""Of a YAML file."""
MOST_DEPTH = 32
MOST_ALIASES = 32


class Config(Section):
    """A whole experiment."""

    seed: Annotated[Seed, decides("reference", "run")] = 0
    """Decides the order of the pairs, noise, timesteps and new weights."""
    model: ModelConfig
    data: DataConfig
    prepare: PrepareConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_held_out(self.train, self.data.held_out)
        check_lora_start(self.train, self.model.lora)
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.path=value` overrides (values are parsed as YAML).

    Raises:
        ConfigError: The file is missing or not a mapping, an override has no `=`, or a key occurs
            twice, is unknown, ill-typed or out of range; the text names the key and the nearest
            valid one.
    """
    raw = read_yaml(path)
    for text in overrides:
        raw = with_words(raw, Config)  # a key may lie in what the file names by a word
        raw = with_keys(raw, _read_override(text), where=f"--set {text}")
    return parse_config(raw, where=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping, bounded in size, depth and aliases.

    Raises:
        ConfigError: It is missing, too large, no YAML or no mapping, or a key occurs twice.
    """
    try:
        raw = parse_yaml(read_bounded(path, MOST_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"expected a YAML file, got a folder: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validates a nested mapping; `where` is put in front of every complaint."""
    try:
        return Config.model_validate(with_words(raw, Config))
    except ValidationError as error:
        lines = [explain(e, Config) for e in error.errors()]
        text = f"{where}: " + "; ".join(dict.fromkeys(lines))
        raise ConfigError(" ".join(text.splitlines())) from None


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def with_keys(
    raw: Mapping[str, Any], values: Mapping[str, Any], where: str = "config"
) -> dict[str, Any]:
    """Returns nested mappings with some keys set, given by their full names; `raw` is not changed.

    Sections that do not exist are made; in a list of sections a number names one, from 0. To lay
    nested mappings over `raw`, `flatten` them first.

    Raises:
        ConfigError: A key lies in what is a value, not a section; the text begins with `where`.
    """
    result = dict(raw)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node: Any = result
        for parent, inner in zip(parents, [*parents, leaf][1:], strict=True):
            place = _place(node, parent, key, where)
            section = node[place] if isinstance(node, list) else node.get(place)
            of_list = isinstance(section, list) and inner.isdecimal()
            if section is not None and not isinstance(section, Mapping) and not of_list:
                raise ConfigError(f"{where}: {parent!r} is a value, not a section")
            node[place] = node = [*section] if isinstance(section, list) else dict(section or {})
        node[_place(node, leaf, key, where)] = value
    return result


def _place(node: Any, name: str, key: str, where: str) -> Any:
    """What a part of a key's name is in a mapping, or in a list."""
    if not isinstance(node, list):
        return name
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"{where}: {key}: the list has {len(node)}, numbered from 0")
    return int(name)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, by full key: `{"train.optim.lr": 1e-5, ...}`.

    Of a list of mappings each has its number: `data.sources.0.path`.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key.path=value, got {text!r}")
    try:
        return {key.strip(): _number(parse_yaml(value)) if value else None}
    except ValueError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--set {text}: the value is not valid YAML: {why}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key may occur once: of two, the first would be ignored silently.

    Depth and aliases are bounded: a few lines of aliases of aliases stand for any amount of text.
    """

    def __init__(self, stream: str) -> None:
        """Begins at the outermost level."""
        super().__init__(stream)
        self._depth = self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Builds one node.

        Raises:
            YAMLError: It lies too deep, or is one alias too many, or an alias of what it lies in.
        """
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"more than {MOST_ALIASES} aliases")
        if self._depth == MOST_DEPTH:
            raise yaml.YAMLError(f"nested more than {MOST_DEPTH} levels deep")
        self._depth += 1
        try:
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Builds one mapping; its anchor counts behind it alone, so that it cannot hold itself."""
        node = super().compose_mapping_node(None)  # pyright: ignore[reportArgumentType]
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def compose_sequence_node(self, anchor: str | None) -> yaml.SequenceNode:
        """Builds one sequence, as `compose_mapping_node`."""
        node = super().compose_sequence_node(None)  # pyright: ignore[reportArgumentType]
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Builds one mapping.

        Raises:
            YAMLError: A key occurs in it twice.
        """
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: the key {key.value} occurs twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parses YAML of plain values.

    Raises:
        ValueError: It is none, is too deep, has too many aliases, or a key occurs twice.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML passes on what `int`, `datetime` and the like raise for a value.
        raise ValueError(str(error)) from None
    _check_text(value)
    return value


def _check_text(value: Any) -> None:
    """Refuses text that neither a file nor a path can hold; escapes in quotes can name it.

    Raises:
        ValueError: It has a zero byte, or half of a character.
    """
    if isinstance(value, str):
        value.encode("utf-8")
        if "\0" in value:
            raise ValueError("a text has a zero byte")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key)
            _check_text(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner)


def _number(value: Any) -> Any:
    """Reads `1e-5`, which YAML 1.1 takes for text, as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
