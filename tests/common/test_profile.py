"""Profiles: every way of writing one wrongly ends in one sentence."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common import profile as profiles
from scfm_circuits.common.profile import (
    BUNDLED_CELLS,
    CELLS_NAMES,
    PACKAGED_CELLS,
    PROFILES,
    Profile,
    cells_path,
    load_profile,
    located,
    model_source,
)
from scfm_circuits.common.profile_files import parse_overrides, split_pairs


def write(folder: Path, text: str, name: str = "mine.yml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yml")), ids=lambda path: path.stem)
def test_the_profiles_that_come_with_the_book_are_valid(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem and profile.title and profile.results.name == path.stem


def test_paper_profile_has_the_papers_settings() -> None:
    paper = load_profile("paper")
    assert (paper.expansion, paper.l1_coefficient, paper.learning_rate) == (8, 1.4e-4, 1e-4)
    assert (paper.training_tokens, paper.model_layers, paper.human_layer) == (60_000_000, 24, 12)


def test_paper_profile_documents_both_readings_of_the_prompt() -> None:
    """The one that Figure 4 prints, and the form of the model's own templates, in a comment."""
    text = (PROFILES / "paper.yml").read_text(encoding="utf-8")
    (line,) = (one for one in text.splitlines() if one.startswith("# prompt: "))
    other = yaml.safe_load(line.removeprefix("# "))["prompt"]
    assert load_profile("paper").prompt == "{genes}.\n\nThe corresponding cell type is:"
    assert load_profile("paper", {"prompt": other}).prompt == other
    assert "{num_genes}" in other and "{organism}" in other


def test_every_field_says_what_it_is() -> None:
    assert not [name for name, field in Profile.model_fields.items() if not field.description]


@pytest.mark.parametrize(("text", "told"), [
    ("sed: 1", "Unknown profile field `sed`"),
    ("seed: -1", "`seed`"),
    ("seed: '1'", "`seed`"),
    ("fdr: 1.5", "`fdr`"),
    ("circuit_nodes: 1", "`circuit_nodes`"),
    ("genes_per_cell: 3", "`genes_per_cell`"),
    ("human_decoys: 1001", "`human_decoys`"),
    ("live_cut: -0.5", "`live_cut`"),
    ("live_cut_table4: -0.5", "`live_cut_table4`"),
    ("cells_are: fake", "`cells_are`"),
    ("model_heads: 3", "3 heads do not divide"),
    ("human_layer: 4", "allowed are 0 to 3"),
    ("model: org/name", "needs its own tokenizer, not `train`"),
    ("model: org/name\ntokenizer: genes", "needs its own tokenizer, not `genes`"),
    ("prompt: no slot", "{genes} exactly once"),
    ("prompt: '{genes} {genes}?'", "{genes} exactly once"),
    ("prompt: 'In {organisms}: {genes}'", "{organisms}, which is none of {genes}, {num_genes}"),
    ("prompt: '{genes}, {cell_sentence}'", "holds the placeholder {cell_sentence}"),
    ("prompt: '{genes} is {label}'", "holds the placeholder {label}"),
    ("response: ' {label} {num_genes}'", "{num_genes}, which is none of {label}"),
    ("response: ' {cell_type}.'", "{label} exactly once"),
    ("buffer_tokens: 10", "at least batch_tokens"),
    ("libraries: []", "`libraries`"),
])
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, f"extends: demo\n{text}\n")
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert told in str(caught.value) and "mine.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_field_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean seed"):
        load_profile(write(tmp_path, "sed: 1\n"))


@pytest.mark.parametrize(("text", "told"), [
    ("a: [1", "not valid YAML at line"),
    ("- a\n- b\n", "must be a list of `field: value` lines"),
    ("", "must be a list of `field: value` lines"),
    ("extends: [demo]\n", "must be the name of a profile"),
    ("extends: mine_not_there\n", "There is no profile 'mine_not_there'"),
    ("extends: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
])
def test_a_file_that_is_no_profile(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        load_profile(write(tmp_path, text))
    assert told in str(caught.value)


def test_a_profile_cannot_extend_itself(tmp_path: Path) -> None:
    first = write(tmp_path, f"extends: {tmp_path / 'b.yml'}\n", "a.yml")
    write(tmp_path, f"extends: {tmp_path / 'a.yml'}\n", "b.yml")
    with pytest.raises(InputError, match="extends itself"):
        load_profile(first)


def test_a_profile_holds_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: smoke\nseed: 7\nl1_coefficient: 1e-3\n")
    mine, smoke = load_profile(path), load_profile("smoke")
    assert (mine.seed, mine.l1_coefficient, mine.name) == (7, 1e-3, "mine")
    same = mine.model_dump(exclude={"seed", "l1_coefficient", "name"})
    assert same == smoke.model_dump(exclude={"seed", "l1_coefficient", "name"})


NAMED = "human_layer: 3\ncells: x.h5ad\ncells_name: hearts\ntitle: T\n"


@pytest.mark.parametrize(("text", "overrides", "name", "title"), [
    ("extends: demo\ncells: ~/a/x.h5ad\n", {}, "cells of x.h5ad", ""),
    ("human_layer: 3\ncells: x.h5ad\n", {}, "cells of x.h5ad", ""),
    ("extends: demo\ncells: x.h5ad\ncells_name: hearts\ntitle: T\n", {}, "hearts", "T"),
    ("extends: demo\n", {"cells": "x.h5ad"}, "cells of x.h5ad", ""),
    ("extends: demo\n", {"cells": "x.h5ad", "cells_name": "hearts"}, "hearts", ""),
    (NAMED, {"cells": "y.h5ad"}, "cells of y.h5ad", ""),
    (NAMED, {"cells": "x.h5ad"}, "hearts", "T"),
    (NAMED, {"cells": BUNDLED_CELLS}, CELLS_NAMES[BUNDLED_CELLS], ""),
    ("extends: pbmc\n", {"cells": PACKAGED_CELLS}, CELLS_NAMES[PACKAGED_CELLS], ""),
    ("extends: demo\ntitle: T\n", {"model": "org/name", "tokenizer": "org/name"},
     load_profile("demo").cells_name, ""),
])
def test_other_cells_do_not_keep_the_names_of_the_base(
    tmp_path: Path, text: str, overrides: dict[str, Any], name: str, title: str
) -> None:
    profile = load_profile(write(tmp_path, text), overrides)
    assert (profile.cells_name, profile.title) == (name, title)
    # Whether a file went through R is known of that file alone.
    assert (profile.symbol_rule == "r_names") == (profile.cells_name == load_profile(
        "demo").cells_name)


def test_a_profile_that_extends_twice_keeps_the_nearest_names(tmp_path: Path) -> None:
    write(tmp_path, "extends: demo\ncells: x.h5ad\ncells_name: hearts\n", "middle.yml")
    path = write(tmp_path, f"extends: {tmp_path / 'middle.yml'}\nseed: 3\n")
    assert load_profile(path).cells_name == "hearts"


def test_a_name_without_its_ending_is_asked_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'mine' .*; known are c2s"):
        load_profile("mine")
    write(tmp_path, "extends: demo\n", "mine.yml")
    with pytest.raises(InputError, match=r"'mine' .*; did you mean your own mine\.yml\?"):
        load_profile("mine")


def test_where_the_cells_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(profiles, "ROOT", tmp_path)

    def path(cells: str) -> Path | None:
        return cells_path(load_profile("demo", {"cells": cells}))

    assert path(BUNDLED_CELLS) is None and path(PACKAGED_CELLS) is None
    assert path("a/x.h5ad") == tmp_path / "a" / "x.h5ad"
    assert path("~/x.h5ad") == tmp_path / "home" / "x.h5ad"
    assert path("/data/x.h5ad") == Path("/data/x.h5ad")
    with pytest.raises(InputError, match="give the whole path"):
        path("~no-such-user/x.h5ad")


@given(st.integers(0, 2**31 - 1), st.floats(0.01, 0.99))
def test_overrides_have_a_name_of_their_own(seed: int, fdr: float) -> None:
    one = load_profile("demo", {"seed": seed, "fdr": fdr})
    other = load_profile("demo", {"fdr": fdr, "seed": seed})
    assert one == other and one.name.startswith("demo+") and one.seed == seed
    assert one.name != load_profile("demo", {"seed": seed, "fdr": fdr / 2}).name


@pytest.mark.parametrize(("text", "pairs"), [
    ("", []), ("seed=1 fdr=0.1", ["seed=1", "fdr=0.1"]),
    ("case_type=CD14+ Monocyte", ["case_type=CD14+ Monocyte"]),
    ("case_type=CD14+ Monocyte seed=1", ["case_type=CD14+ Monocyte", "seed=1"]),
    ("'case_type=a  b=c' seed=1", ["case_type=a  b=c", "seed=1"]),
    ("""'response=" {label}."' seed=1""", ['response=" {label}."', "seed=1"]),
    ("libraries=[A, B] seed=1", ["libraries=[A, B]", "seed=1"]),
    ("seed 1", ["seed 1"]), (r"title=a\b\n c\\ seed=1", [r"title=a\b\n c\\", "seed=1"]),
    ("title=a #b", ["title=a #b"]),
])
def test_several_pairs_in_one_text(text: str, pairs: list[str]) -> None:
    assert split_pairs(text) == pairs


def test_a_mark_that_is_not_closed_is_told() -> None:
    with pytest.raises(InputError, match="a quotation mark is not closed"):
        split_pairs("case_type=5' end")


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True),
                       st.text(st.characters(codec="utf-8", exclude_characters="\0")),
                       max_size=4))
def test_whatever_is_quoted_comes_back(given_: dict[str, str]) -> None:
    pairs = [f"{key}={value}" for key, value in given_.items()]
    assert split_pairs(shlex.join(pairs)) == pairs


@pytest.mark.parametrize(("text", "value"), [
    ("cluster #3", "cluster #3"), ("T # naive", "T # naive"), ("CD4: naive", "CD4: naive"),
    ("7", "7"), ("1e6", "1e6"), ("yes", "yes"), ("null", "null"), ("[a", "[a"), ("{a}", "{a}"),
    ('"7"', "7"), ("'7'", "7"), ("'T' cell", "'T' cell"), ('"T" cell', '"T" cell'),
    (" T  ", " T  ")])
def test_text_on_a_command_line_is_taken_as_it_stands(text: str, value: str) -> None:
    assert parse_overrides([f"title={text}"], Profile.model_fields) == {"title": value}


def test_what_is_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML takes the last one, and says nothing."""
    path = write(tmp_path, "extends: demo\nseed: 1\n# the other\nseed: 2\n")
    with pytest.raises(InputError, match=r"mine.yml has the field `seed` twice"):
        load_profile(path)
    with pytest.raises(InputError, match="`seed` is given twice"):
        parse_overrides(["seed=1", "fdr=0.1", "seed=1"], Profile.model_fields)


@pytest.mark.parametrize("line", [r"prompt: '{genes}.\n\nType:'", r"prompt: Of {genes}.\n\nType",
                                  r"response: ' {label}.\n'"])
def test_a_line_break_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    """The model would have been asked with a backslash and an n."""
    with pytest.raises(InputError, match=r"holds \\n as a backslash and a letter"):
        load_profile(write(tmp_path, f"extends: demo\n{line}\n"))
    key, _, text = line.partition(": ")
    pairs = split_pairs(f"{key}={text}")
    with pytest.raises(InputError, match=r"holds \\n as a backslash and a letter"):
        load_profile("demo", parse_overrides(pairs, Profile.model_fields))
    inside = text.strip("'")
    for profile in (write(tmp_path, f'extends: demo\n{key}: "{inside}"\n'), "demo"):
        given_ = parse_overrides(split_pairs(f"'{key}=\"{inside}\"'"), Profile.model_fields)
        found = load_profile(profile, given_ if profile == "demo" else {})
        assert "\n" in getattr(found, key) and "\\" not in getattr(found, key)


def test_the_example_of_the_book_is_read() -> None:
    pairs = split_pairs("seed=1 'prompt={genes}. Type = '")
    profile = load_profile("demo", parse_overrides(pairs, Profile.model_fields))
    assert (profile.seed, profile.prompt) == (1, "{genes}. Type = ")


def test_text_that_may_be_missing_and_lists_are_read_as_in_a_file() -> None:
    pairs = ["gene_sets=null", "symbol_column=1", "libraries=[A, 'B']", "symbol_rule=r_names"]
    assert parse_overrides(pairs, Profile.model_fields) == {
        "gene_sets": None, "symbol_column": "1", "libraries": ["A", "B"], "symbol_rule": "r_names"}


@given(st.text(st.characters(codec="utf-8")))
def test_overrides_reach_another_process_as_they_are(text: str) -> None:
    """As `make book` hands them to the estimate of the cost."""
    pairs = [f"{key}={json.dumps(value)}" for key, value in
             {"case_type": text, "known_response": [text], "gene_sets": None}.items()]
    assert parse_overrides(pairs, Profile.model_fields) == {
        "case_type": text, "known_response": [text], "gene_sets": None}


@pytest.mark.parametrize("text", ["7", "yes", "0.5", "2024-03-01", "1e6"])
def test_text_that_a_file_reads_as_something_else_is_asked_for_in_quotes(tmp_path: Path,
                                                                        text: str) -> None:
    with pytest.raises(InputError, match=r"`case_type`.*put it into quotes"):
        load_profile(write(tmp_path, f"extends: demo\ncase_type: {text}\n"))
    quoted = load_profile(write(tmp_path, f"extends: demo\ncase_type: '{text}'\n", "b.yml"))
    assert quoted.case_type == text


@pytest.mark.parametrize(("text", "number"), [
    ("1e6", 1_000_000), ("1.5e3", 1500), ("2E+2", 200), ("1_0e1", 100), ("600000", 600_000)])
def test_whole_numbers_may_be_written_with_an_exponent(tmp_path: Path, text: str,
                                                       number: int) -> None:
    path = write(tmp_path, f"extends: demo\ntraining_tokens: {text}\nl1_coefficient: {text}\n")
    profile = load_profile(path)
    assert profile.training_tokens == number and isinstance(profile.training_tokens, int)
    assert profile.l1_coefficient == number and isinstance(profile.l1_coefficient, float)
    pairs = parse_overrides([f"training_tokens={text}", "learning_rate=1e-4"],
                            Profile.model_fields)
    assert load_profile("demo", pairs).training_tokens == number


@pytest.mark.parametrize("text", ["1.5e0", "1e-3", "1e400", ".inf", ".nan", "1.0"])
def test_what_is_no_whole_number_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="`training_tokens`"):
        load_profile(write(tmp_path, f"extends: demo\ntraining_tokens: {text}\n"))


@pytest.mark.parametrize("text", ["1e400", ".inf", ".nan"])
def test_no_field_is_infinite(tmp_path: Path, text: str) -> None:
    for field in ("l1_coefficient", "checkpoint_seconds", "live_cut"):
        with pytest.raises(InputError, match=f"`{field}`"):
            load_profile(write(tmp_path, f"extends: demo\n{field}: {text}\n"))


# --- paths ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root and a home, and a working directory that holds other things of the same names."""
    for name in ("root", "home", "elsewhere"):
        (tmp_path / name / "mine").mkdir(parents=True)
    for module in (profiles, manifest):
        monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize(("written", "place"), [
    ("mine", "root/mine"), ("./mine", "root/mine"), ("~/mine", "home/mine")])
def test_all_paths_of_a_profile_follow_one_rule(places: Path, written: str, place: str) -> None:
    there = places / place
    assert located("gene_groups", written).resolve() == there
    assert Path(model_source("model", written)).resolve() == there
    assert next(iter(manifest.gene_set_folders(written))).resolve() == there
    profile = load_profile(write(places, f"cells: {written}/x.h5ad\n"))
    found = cells_path(profile)
    assert found is not None and found.resolve() == there / "x.h5ad"


def test_a_name_that_is_no_folder_is_that_of_a_model(places: Path) -> None:
    assert model_source("model", "org/name") == "org/name"
    assert model_source("model", "train") == "train"
    for name in ("~/none", "/no/where", "./none", "a/b/c"):
        with pytest.raises(InputError, match="there is no folder"):
            model_source("model", name)
    with pytest.raises(InputError, match=r"`tokenizer`.* give the whole path"):
        model_source("tokenizer", "~no-such-user/x")


def test_what_a_profile_extends_does_not_depend_on_the_working_directory(places: Path) -> None:
    (places / "root" / "base.yml").write_text("seed: 1\n")
    (places / "elsewhere" / "base.yml").write_text("seed: 2\n")
    path = write(places, "extends: base.yml\n")
    assert load_profile(path).seed == 1
    # A path on the command line starts where the command is given.
    assert load_profile("base.yml").seed == 2


@pytest.mark.parametrize("overrides", [{"sed": 1}, {"seed": "1"}, {"name": "x"}, {"extends": "x"}])
def test_a_wrong_override_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        load_profile("demo", overrides)


def test_shipped_files_hold_no_unread_keys() -> None:
    for path in PROFILES.glob("*.yml"):
        keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert keys <= {*Profile.model_fields, "extends"}
