"""Writes the tables of docs/from-your-trainer.md: what becomes of each option of each trainer.

python scripts/update_options.py
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastpo.bench.table import with_section
from fastpo.convert import flow_factory, simpletuner_options
from fastpo.convert.launch import Launch
from fastpo.convert.rules import Draft, Rule
from fastpo.convert.scripts import SCRIPTS, Script, convert_script
from fastpo.system.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "from-your-trainer.md"
SECTION = "options"
NEEDED = ("pretrained_model_name_or_path", "dataset_name", "output_dir")
HEAD = "| option | default | our key | what becomes of it |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Trainer:
    """What the page says of a trainer.

    Attributes:
        name: What `--trainer` calls it.
        dashes: What an option begins with.
        rules: What becomes of its options.
        defaults: Its defaults where they are not ours.
        more: Sentences below the table.
    """

    name: str
    dashes: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, str]
    more: tuple[str, ...] = ()


def trainers() -> list[Trainer]:
    """All that `fastpo convert-args` knows."""
    of_scripts = [
        Trainer(one.name, "--", one.rules, one.defaults, (_always(one),)) for one in SCRIPTS
    ]
    tuner, factory = simpletuner_options, flow_factory
    variables = ", ".join(f"`{name}` is `{o}`" for name, o in tuner.ENVIRONMENT.items())
    beginnings = (
        f"Passed over are all other options that begin with {_listed(tuner.ASIDE)}.",
        f"Variables of `config.env` are options in capitals, but {variables}.",
    )
    sections = (f"Passed over are the sections {_listed(factory.ASIDE)}.",)
    return [
        *of_scripts,
        Trainer(tuner.NAME, "", tuner.RULES, tuner.DEFAULTS, beginnings),
        Trainer(factory.NAME, "", factory.RULES, factory.DEFAULTS, sections),
    ]


def tables() -> str:
    """The page's section."""
    return "\n".join(map(table, trainers())).strip()


def table(trainer: Trainer) -> str:
    """A trainer's heading, table and sentences."""
    rows, silent = [], []
    for name, rule in trainer.rules.items():
        if rule == Rule(read=rule.read, switch=rule.switch):
            silent.append(trainer.dashes + name)
            continue
        default = trainer.defaults.get(name)
        keys = _listed(dict.fromkeys((*([rule.key] if rule.key else []), *rule.sets)))
        shown = "" if default is None else f"`{default}`"
        cells = (f"`{trainer.dashes}{name}`", shown, keys, "; ".join(_words(rule)))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    more = [f"Without effect on the result: {_listed(silent)}."] if silent else []
    below = "".join(f"\n{text}\n" for text in (*more, *trainer.more))
    return f"### `{trainer.name}`\n\n{HEAD}{''.join(rows)}{below}"


def _words(rule: Rule) -> Iterable[str]:
    if rule.about is not None:
        yield rule.about
    if rule.refuse is not None:
        harmless = f", but for {_listed(rule.harmless)}" if rule.harmless else ""
        yield f"refused{harmless}: {rule.refuse}"
    if rule.note is not None:
        yield f"a note: {rule.note}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _always(script: Script) -> str:
    """The keys that a launch with no more than its model, data and folder gets besides."""
    draft, given = Draft(), {name: name for name in NEEDED}
    launch = Launch("", script.files[0], arguments=given)
    convert_script(script, launch, processes=None, draft=draft)
    own = {script.rules[name].key for name in (*given, *script.defaults)}
    left = {key: value for key, value in draft.keys.items() if key not in own}
    words = {True: "true", False: "false"}
    return "A launch without further options has: " + (
        _listed(
            f"{key}: {words.get(v, v) if isinstance(v, bool) else v}" for key, v in left.items()
        )
        + "."
    )


if __name__ == "__main__":
    write_text(PAGE, with_section(PAGE.read_text(), SECTION, tables()))
