"""Names of `memlm.eval` mean the same whatever was imported before."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import memlm.eval

FUNCTIONS = {"compare", "evaluate", "perplexity", "remembrance"}
CLASSES = {"Haystack", "Report"}
MODULES = {"babi", "babilong", "haystack", "metrics"}


def test_names_do_not_depend_on_what_was_imported_before() -> None:
    for found in pkgutil.walk_packages(memlm.eval.__path__, "memlm.eval."):
        if "harness" not in found.name:  # Needs an extra.
            importlib.import_module(found.name)
    assert set(memlm.eval.__all__) == FUNCTIONS | CLASSES | MODULES
    assert all(inspect.isfunction(getattr(memlm.eval, name)) for name in FUNCTIONS)
    assert all(inspect.isclass(getattr(memlm.eval, name)) for name in CLASSES)
    assert all(inspect.ismodule(getattr(memlm.eval, name)) for name in MODULES)
    assert memlm.eval.babi.TASKS[-1] == "qa20" and callable(memlm.eval.babilong.compose)
    with pytest.raises(ValueError, match="does not exist"):
        memlm.eval.compare("nowhere", "nowhere-else")
