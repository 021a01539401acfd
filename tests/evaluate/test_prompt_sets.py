"""Published prompt sets, in files of the published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpo.errors import ConfigError
from fastpo.evaluate.prompt_sets import SETS, configured_sets, read_prompt_set
from fastpo.evaluate.sampling import plan_samples
from fastpo.testing import pickapic_row, write_pickapic
from tests.evaluate.test_evaluate import make_config

PARTI = """Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\t
a sign that says "NO\tArtifacts\tWriting & Symbols\t
bond\tAbstract\tBasic\t
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [pickapic_row(i) for i in range(3)]
    write_pickapic(tmp_path / "pick/data/validation_unique-00000-of-00001-ab12.parquet", rows)
    write_pickapic(tmp_path / "pick/data/train-00000-of-00001-ab12.parquet", [pickapic_row(5)])
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    (tmp_path / "hpd/benchmark").mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        prompts = [f"{style} {i}" for i in range(3)]
        (tmp_path / f"hpd/benchmark/{style}.json").write_text(json.dumps(prompts))
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"},
    ]
    (tmp_path / "prompts").mkdir()
    metadata = "\n".join(map(json.dumps, lines)) + "\n"
    (tmp_path / "prompts/evaluation_metadata.jsonl").write_text(metadata)
    return tmp_path


def test_pick_a_pic_s_unique_validation_prompts(files: Path) -> None:
    found = read_prompt_set(f"pickapic:{files / 'pick'}")
    assert found.prompts == ("caption 0", "caption 1", "caption 2") and found.groups == ()
    assert found.name == "pickapic" and SETS["pickapic"].published == 500


def test_parti_prompts_keep_their_quotes_and_count_once(files: Path) -> None:
    found = read_prompt_set(f"parti:{files}")
    assert found.prompts == ("bond", 'a sign that says "NO')
    assert found.groups == ("Abstract", "Artifacts")


def test_hpdv2_has_four_styles(files: Path) -> None:
    found = read_prompt_set(f"hpdv2:{files / 'hpd'}", most=2)
    assert len(found.prompts) == 8 and found.prompts[2:4] == ("concept-art 0", "concept-art 1")
    assert found.groups[::2] == ("anime", "concept-art", "paintings", "photo")
    one = read_prompt_set(f"hpdv2:{files / 'hpd/benchmark/photo.json'}")
    assert one.prompts == ("photo 0", "photo 1", "photo 2") and set(one.groups) == {"photo"}
    (files / "hpd/benchmark/photo.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no anime\.json or concept-art\.json"):
        read_prompt_set(f"hpdv2:{files / 'hpd'}")


def test_geneval_s_prompts_and_tags(files: Path) -> None:
    found = read_prompt_set(f"geneval:{files}")
    assert found.prompts == ("a bench", "two cups")
    assert found.groups == ("single_object", "counting")


def test_what_is_not_as_published_is_one_line(files: Path) -> None:
    (files / "broken.tsv").write_text("Text\na\n")
    (files / "broken.json").write_text('{"a": 1}')
    (files / "empty.txt").write_text("\n")
    for text, words in {
        "party:x": r"unknown set 'party'; did you mean 'parti'",
        "parti": "parti needs its file or folder: parti:PATH",
        f"parti:{files / 'none'}": "none does not exist",
        f"parti:{files / 'pick'}": r"holds no PartiPrompts\.tsv",
        f"parti:{files / 'broken.tsv'}": "is not as published: .*Prompt",
        f"hpdv2:{files / 'broken.json'}": "a list of prompts was expected",
        f"pickapic:{files / 'broken.tsv'}": "is not as published",
        f"lines:{files / 'empty.txt'}": "holds no prompt",
    }.items():
        with pytest.raises(ConfigError, match=words) as refused:
            read_prompt_set(text)
        assert "\n" not in str(refused.value)


def test_a_configuration_s_sets(files: Path, tmp_path: Path) -> None:
    sets = [f"geneval:{files}", f"parti:{files}"]
    config = make_config(tmp_path, tmp_path, prompts=["a", "bond"], prompt_sets=sets)
    assert [one.name for one in configured_sets(config)] == ["prompts", "geneval", "parti"]
    samples = plan_samples(config)
    assert [s.prompt for s in samples[::2]] == [
        *("a", "bond", "a bench", "two cups", 'a sign that says "NO')
    ]
    assert [s.seed for s in samples] == list(range(10))
    few = make_config(tmp_path, tmp_path, prompts=[], prompt_sets=sets, prompts_per_set=1)
    assert [len(one.prompts) for one in configured_sets(few)] == [1, 1]
    with pytest.raises(ConfigError, match="parti is named twice"):
        configured_sets(make_config(tmp_path, tmp_path, prompt_sets=[sets[1], sets[1]]))
    with pytest.raises(ConfigError, match="nothing to sample"):
        configured_sets(make_config(tmp_path, tmp_path, prompts=[]))
