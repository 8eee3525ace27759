"""Figures look alike, whichever chapter draws them."""

import importlib
import pkgutil
import sys

import matplotlib as mpl
import pytest

from scfm_circuits.report import plots

FILES = [one.name for one in pkgutil.iter_modules(plots.__path__)]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_figures_sets_the_theme(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [one for one in sys.modules if one.startswith(f"{plots.__name__}.")]:
        monkeypatch.delitem(sys.modules, module)
    with mpl.rc_context():
        mpl.rcdefaults()
        importlib.import_module(f"{plots.__name__}.{name}")
        assert mpl.rcParams["axes.titleweight"] == "bold" and mpl.rcParams["axes.grid"]
