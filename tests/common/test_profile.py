"""Profiles: every way of writing one wrongly ends in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.common.profile import (
    BUNDLED_CELLS,
    CELLS_NAMES,
    PACKAGED_CELLS,
    PROFILES,
    Profile,
    cells_path,
    load_profile,
    profile_files,
)


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


def test_every_field_says_what_it_is() -> None:
    assert not [name for name, field in Profile.model_fields.items() if not field.description]


@pytest.mark.parametrize(("text", "told"), [
    ("sed: 1", "Unknown profile field `sed`"),
    ("seed: -1", "`seed`"),
    ("seed: '1'", "`seed`"),
    ("fdr: 1.5", "`fdr`"),
    ("cells_are: fake", "`cells_are`"),
    ("model_heads: 3", "3 heads do not divide"),
    ("human_layer: 6", "allowed are 0 to 5"),
    ("model: org/name", "needs its own tokenizer, not `train`"),
    ("model: org/name\ntokenizer: genes", "needs its own tokenizer, not `genes`"),
    ("prompt: no slot", "{genes} exactly once"),
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
    assert [file.name for file in profile_files(path)] == ["mine.yml", "smoke.yml", "demo.yml"]


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


def test_where_the_cells_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def path(cells: str) -> Path | None:
        return cells_path(load_profile("demo", {"cells": cells}), tmp_path)

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


@pytest.mark.parametrize("overrides", [{"sed": 1}, {"seed": "1"}, {"name": "x"}, {"extends": "x"}])
def test_a_wrong_override_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        load_profile("demo", overrides)


def test_shipped_files_hold_no_unread_keys() -> None:
    for path in PROFILES.glob("*.yml"):
        keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert keys <= {*Profile.model_fields, "extends"}
