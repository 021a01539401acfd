"""Only what is proven to be ours is replaced or removed, by one helper for all commands."""

import ast
import json
from pathlib import Path

import pytest

import fastpo
from fastpo.errors import ForeignPathError
from fastpo.system.ownership import (
    MARKER,
    Kind,
    claim,
    is_ours,
    owned_folder,
    protecting,
    remove_file,
    remove_owned,
)

PACKAGE = Path(fastpo.__file__).parent
# What removes, moves or replaces, under any name that it is called by.
REMOVING = {
    *("unlink", "rmdir", "rmtree", "rename", "renames", "removedirs", "replace", "move", "remove"),
    *("truncate", "symlink_to", "hardlink_to", "link", "symlink"),
    *("replace_folder", "whole_folder"),
}
# What writes under the very name that it is given.
WRITING = {
    *("write_text", "write_bytes", "write_json", "whole_file", "append_text", "write_recorded"),
    *("open", "touch", "copy", "copy2", "copyfile", "copytree", "tofile"),
    *("save", "savez", "savez_compressed", "savetxt", "save_file", "save_pretrained"),
    *("write_table", "OSFile", "new_file", "to_csv", "to_parquet", "savefig", "extractall"),
}
MEMORY = "into memory"
NEW = "takes nothing's place: `replace=False`"
OWN_NAME = "an own name in a folder of ours, which `claim` has found to be ours or new"
TEMPORARY = "into the temporary of `owned_folder`, `whole_folder` or `whole_file`"
RUN = "an own name in a run's folder, which `takeover.check_folder` has found to be a run's"
CHOSEN = "a file that the caller names; of `fastpo bench --out`, `check_csv` has looked at it"
ELSEWHERE = {
    "system/": "the helper, and the durable write below it",
    "selftest/": "damages on purpose what it has just made itself under a new name (`mkdtemp`)",
}
# Where such calls stand beside these: module and function, calls, and why.
ALLOWED = {
    ("bench/table.py", "write_records"): ({"write_text"}, CHOSEN),
    ("data/cache/flips.py", "write_flip_mask"): ({"write_text"}, OWN_NAME),
    ("data/cache/index.py", "merge"): ({"write_text"}, OWN_NAME),
    ("data/cache/arrow.py", "write"): ({"new_file", "OSFile"}, TEMPORARY),
    ("data/cache/arrow.py", "write_arrow"): ({"write_recorded"}, OWN_NAME),
    ("data/cache/manifest.py", "save"): ({"write_text"}, OWN_NAME),
    ("data/cache/manifest.py", "write_recorded"): ({"whole_file"}, OWN_NAME),
    ("data/cache/parts.py", "write"): ({"whole_folder", "write_text"}, NEW),
    ("data/cache/parts.py", "rows_writer"): ({"write_text"}, TEMPORARY),
    ("data/cache/parts.py", "tensor_writer"): ({"save_file"}, TEMPORARY),
    ("data/cache/parts.py", "table_writer"): ({"write_table"}, TEMPORARY),
    ("data/prepare/latents.py", "_bad_rows_listed"): ({"write_text"}, OWN_NAME),
    ("data/prepare/latents.py", "_finish"): ({"save"}, OWN_NAME),
    ("data/prepare/latents.py", "_remember"): ({"save"}, OWN_NAME),
    ("data/prepare/latents.py", "_compare"): ({"save"}, OWN_NAME),
    ("data/prepare/remake.py", "take_back"): ({"save"}, OWN_NAME),
    ("data/prepare/partition.py", "partition"): ({"save"}, OWN_NAME),
    ("demo/base.py", "build_base"): ({"write_text", "save_pretrained"}, TEMPORARY),
    ("demo/preferences.py", "write_preferences"): ({"whole_file", "write_table"}, OWN_NAME),
    ("demo/preferences.py", "_png"): ({"save"}, MEMORY),
    ("demo/run.py", "run_demo"): ({"write_json"}, OWN_NAME),
    ("evaluate/compare.py", "_fill_base"): ({"copytree"}, TEMPORARY),
    ("evaluate/compare.py", "_write"): ({"write_json", "write_text"}, OWN_NAME),
    ("convert/command.py", "convert"): ({"write_text"}, "refuses a name that is taken"),
    ("evaluate/many.py", "evaluate_many"): ({"write_table"}, OWN_NAME),
    ("evaluate/many.py", "score"): ({"write_json"}, OWN_NAME),
    ("evaluate/sampling.py", "put_together"): ({"write_json"}, OWN_NAME),
    ("evaluate/score.py", "score_pictures"): ({"write_text"}, "refuses a name that is taken"),
    ("evaluate/table_files.py", "write_table"): ({"write_json", "write_text"}, OWN_NAME),
    ("evaluate/sampling.py", "write_png"): ({"whole_file", "save"}, OWN_NAME),
    ("models/export.py", "export_policy"): ({"save"}, TEMPORARY),
    ("models/export.py", "sort_metadata"): ({"open"}, TEMPORARY),
    ("models/lora_formats.py", "write_lora"): ({"copyfile", "save_file", "save"}, TEMPORARY),
    ("models/family.py", "save"): ({"save_pretrained"}, TEMPORARY),
    ("pairs/sample.py", "pairs_from_model"): ({"write_text"}, OWN_NAME),
    ("pairs/tables.py", "pairs_from_table"): ({"write_text"}, "refuses a name that is taken"),
    ("plan/init.py", "write_config"): ({"write_text"}, "`_check_free` reads the file's signature"),
    ("reference_cache/fingerprint.py", "_denoiser_digest"): ({"write_text"}, OWN_NAME),
    ("reference_cache/store.py", "write_part"): ({"write_bytes", "save"}, OWN_NAME),
    ("reference_cache/store.py", "merge_parts"): ({"write_text"}, OWN_NAME),
    ("reference_cache/store.py", "write"): ({"open", "save"}, TEMPORARY),
    ("reference_cache/store.py", "_merge_visit"): ({"write_recorded"}, OWN_NAME),
    ("report/figures.py", "to_png"): ({"savefig"}, MEMORY),
    ("report/grids.py", "_image_url"): ({"save"}, MEMORY),
    ("report/page.py", "write_report"): ({"write_bytes", "write_text"}, OWN_NAME),
    ("review/evidence.py", "write_table"): ({"whole_file", "write_table"}, OWN_NAME),
    ("review/gallery.py", "write_gallery"): ({"write_json", "write_table", "write_text"}, OWN_NAME),
    ("review/relabel.py", "add"): ({"open"}, TEMPORARY),
    ("review/relabel.py", "relabel"): ({"write_json"}, TEMPORARY),
    ("review/relabel.py", "_write"): ({"open"}, TEMPORARY),
    ("review/pictures.py", "thumbnail"): ({"save"}, MEMORY),
    ("study/digits.py", "_relabel"): ({"whole_file", "write_table"}, OWN_NAME),
    ("study/emoji/base.py", "build_emoji_base"): ({"write_text", "save_pretrained"}, TEMPORARY),
    ("study/emoji/grid.py", "main"): ({"write_bytes"}, CHOSEN),
    ("study/emoji/pictures.py", "png"): ({"save"}, MEMORY),
    ("study/emoji/pictures.py", "write_pictures"): ({"whole_file", "write_table"}, OWN_NAME),
    ("study/emoji/preferences.py", "write_preferences"): ({"whole_file", "write_table"}, OWN_NAME),
    ("study/jobs.py", "make_data"): ({"write_json"}, OWN_NAME),
    ("study/page.py", "_shown"): ({"write_bytes"}, CHOSEN),
    ("study/page.py", "write_page"): ({"write_text"}, CHOSEN),
    ("study/methods.py", "_doubted"): ({"write_text"}, RUN),
    ("study/rivals.py", "on_step"): ({"open", "whole_file", "savez"}, RUN),
    ("study/rows.py", "keep_row"): ({"write_json"}, OWN_NAME),
    ("study/ledger.py", "keep"): ({"savez"}, CHOSEN),
    ("study/replay.py", "main"): ({"write_text"}, CHOSEN),
    ("testing/datasets.py", "image_bytes"): ({"save"}, MEMORY),
    ("testing/datasets.py", "write_pickapic"): ({"write_table"}, CHOSEN),
    ("testing/datasets.py", "write_pickapic_columns"): ({"write_table"}, CHOSEN),
    ("testing/datasets.py", "write_folder"): ({"write_bytes", "write_text"}, CHOSEN),
    ("testing/single_files.py", "write_single_file"): ({"save_file"}, CHOSEN),
    ("testing/scorers.py", "tiny_clip_folder"): ({"save_pretrained"}, CHOSEN),
    ("testing/pipelines.py", "save_pipeline"): ({"save_pretrained"}, CHOSEN),
    ("testing/language_pipelines.py", "tiny_qwen_image_edit_folder"): (
        {"save_pretrained", "write_json"},
        CHOSEN,
    ),
    ("train/checkpoint.py", "_save_optimizer"): ({"save"}, TEMPORARY),
    ("train/checkpoint.py", "_files"): ({"write_text"}, TEMPORARY),
    ("train/consolidate.py", "export_lora"): ({"whole_file"}, "refuses a name that is taken"),
    ("train/history.py", "write_record"): ({"write_text"}, RUN),
    ("train/run_folder.py", "begin"): ({"write_bytes", "write_text"}, RUN),
    ("train/run_folder.py", "log"): ({"append_text"}, RUN),
    ("train/run_folder.py", "write_minority"): ({"write_text"}, RUN),
    ("train/votes_log.py", "_append"): ({"append_text"}, RUN),
    ("train/votes_log.py", "begin"): ({"write_bytes"}, RUN),
    ("train/samples.py", "_write"): ({"write_json"}, OWN_NAME),
    ("train/takeover.py", "set_aside"): ({"move"}, RUN),
    ("train/takeover.py", "put_back"): ({"move", "remove"}, RUN),
    ("train/takeover.py", "drop_aside"): ({"remove"}, RUN),
}


class Calls(ast.NodeVisitor):
    """Collects calls that remove, replace or write, by the function that makes them."""

    def __init__(self):
        self.function, self.found = "", {}

    def visit_FunctionDef(self, node):
        before, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node):
        owner = ""
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if name in REMOVING | WRITING and not self._is_of_values(name, owner, node):
            self.found.setdefault(self.function, set()).add(name)
        self.generic_visit(node)

    def _is_of_values(self, name, owner, node):
        """Methods of texts, lists and dates that have the names of those of files."""
        if name == "open":
            words = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
            modes = [w.value for w in words if isinstance(w, ast.Constant)]
            return not any(
                set("wax+") & set(str(m)) and set(str(m)) <= set("rwaxbt+") for m in modes
            )
        if name == "replace":  # `Path.replace` takes one, `os.replace` two
            return owner != "os" and (len(node.args) != 1 or bool(node.keywords))
        if name in ("remove", "link", "move"):
            return isinstance(node.func, ast.Attribute) and owner not in ("os", "files", "shutil")
        return name == "copy" and not node.args


def calls_of(text):
    visitor = Calls()
    visitor.visit(ast.parse(text))
    return visitor.found


def all_calls():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if not module.startswith(tuple(ELSEWHERE)):
            for function, names in calls_of(path.read_text()).items():
                found[module, function] = names
    return found


def test_nothing_is_removed_or_replaced_without_the_helper():
    """A new call belongs behind `fastpo.system.ownership`, or, with its reason, in the list."""
    assert all_calls() == {place: names for place, (names, _) in ALLOWED.items()}


@pytest.mark.parametrize(
    "line",
    [
        "path.unlink()",
        "os.remove(path)",
        "shutil.rmtree(path)",
        "path.replace(other)",
        "os.replace(path, other)",
        "open(path, 'w')",
        "path.open(mode='ab')",
        "path.write_text('')",
        "remove(path)",
        "files.remove(path)",
        "with whole_folder(path): pass",
    ],
)
def test_the_list_sees_a_new_call(line):
    assert calls_of(f"def act(path, other):\n    {line}\n")
    assert not calls_of("def act(text):\n    text.replace('a', 'b'); open(text); [text].copy()\n")


THING = Kind("a thing", r"part-\d", lambda folder: (folder / "part-0").exists())


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make(target, **content):
    with owned_folder(target, THING) as folder:
        for name, text in content.items():
            (folder / name.replace("_", "-")).write_text(text)
    return target


def test_a_folder_of_ours_is_replaced_and_removed(tmp_path):
    target = make(tmp_path / "thing", part_0="old", part_1="old")
    make(target, anything="new")
    assert everything(target).keys() == {MARKER, "anything"}
    marker = json.loads((target / MARKER).read_text())
    assert (marker["kind"], marker["files"]) == ("a thing", ["anything"])
    remove_owned(target, THING)
    assert not list(tmp_path.iterdir())


def test_equal_folders_have_equal_markers(tmp_path):
    one, two = (make(tmp_path / name, part_0="x") for name in "ab")
    assert everything(one) == everything(two)


@pytest.mark.parametrize("marked", [True, False])
def test_a_users_file_in_a_folder_of_ours_is_named(tmp_path, marked):
    target = make(tmp_path / "thing", part_0="ours")
    if not marked:
        (target / MARKER).unlink()
    (target / "notes").write_text("kept")
    before = everything(target)
    for act in (make, lambda path: remove_owned(path, THING)):
        with pytest.raises(ForeignPathError, match="thing/notes is not a thing's"):
            act(target)
    assert everything(target) == before


def test_a_file_that_appears_while_the_new_folder_is_made_is_kept(tmp_path):
    target = make(tmp_path / "thing", part_0="ours")
    with pytest.raises(ForeignPathError, match="notes"), owned_folder(target, THING):
        (target / "notes").write_text("kept")
    assert everything(target).keys() == {MARKER, "part-0", "notes"}


@pytest.mark.parametrize("what", ["file", "folder", "link", "other kind", "no marker", "hidden"])
def test_what_is_not_ours_is_refused(tmp_path, what):
    target, elsewhere = tmp_path / "thing", make(tmp_path / "elsewhere", part_0="kept")
    if what == "file":
        target.write_text("kept")
    elif what == "link":
        target.symlink_to(elsewhere)
    else:
        target.mkdir()
        name = {"other kind": "part-0", "no marker": MARKER, "hidden": ".git"}.get(what, "mine")
        (target / name).write_text("kept")
    if what == "other kind":
        (target / "part-0").rename(target / "x")
        (target / MARKER).write_text('{"kind": "a run", "version": "0"}')
    before = everything(tmp_path)
    for act in (make, lambda path: remove_owned(path, THING)):
        with pytest.raises(ForeignPathError, match=r"thing is |is not a thing"):
            act(target)
    assert everything(tmp_path) == before


def test_what_a_command_reads_is_neither_replaced_nor_removed(tmp_path):
    target = make(tmp_path / "thing", part_0="ours")
    (tmp_path / "link").symlink_to(target)
    with protecting([tmp_path / "link" / "part-0", tmp_path / "none"]):
        for act in (make, lambda path: remove_owned(path, THING)):
            with pytest.raises(ForeignPathError, match=r"this command reads .*thing/part-0"):
                act(target)
        with pytest.raises(ForeignPathError, match="this command reads"):
            remove_file(target / "part-0", THING)
    remove_file(target / "part-0", THING)
    remove_owned(target, THING)


def test_a_single_file_is_removed_from_a_folder_of_ours_alone(tmp_path):
    target = make(tmp_path / "thing", part_0="ours")
    (tmp_path / "mine").write_text("kept")
    (target / "link").symlink_to(tmp_path / "mine")
    remove_file(target / "link", THING)
    remove_file(target / "part-0", THING)
    assert (tmp_path / "mine").exists() and not (target / "part-0").exists()
    with pytest.raises(ForeignPathError, match="mine is not a thing's"):
        remove_file(tmp_path / "mine", THING)


def test_a_folder_is_claimed_if_it_is_new_empty_or_ours(tmp_path):
    for name in ("new", "empty", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "new").rmdir()
    (tmp_path / "empty" / ".DS_Store").write_text("")
    (tmp_path / "old" / "part-0").write_text("")
    (tmp_path / "old" / "notes").write_text("kept")
    for name in ("new", "empty", "old"):
        claim(tmp_path / name, THING)
        marker = (tmp_path / name / MARKER).read_bytes()
        claim(tmp_path / name, THING)
        assert (tmp_path / name / MARKER).read_bytes() == marker
        assert is_ours(tmp_path / name, THING)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "file"):
        with pytest.raises(ForeignPathError, match=f"{name} is .*not a thing.*another folder"):
            claim(tmp_path / name, THING)
    assert not (tmp_path / "mine" / MARKER).exists()
