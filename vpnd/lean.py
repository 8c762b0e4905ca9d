"""Importing a library without those of its parts that are never used here.

Libraries import all they have, and what they need for it: of control's memory that was half, of the supervisor's a
quarter. `without` puts an empty module in the place of each part that is named: every name can be imported from it, and
stands for a class that nothing is an instance of, and that cannot be made once the import is over.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, MutableSequence, Sequence
from types import ModuleType
from typing import Any


class _Kind(abc.ABCMeta):
    """Of classes that are left out: what is asked of one is left out, too."""

    def __getattr__(cls, name: str) -> Any:
        return _left_out(f"{cls.__qualname__}.{name}", name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return cls  # what a module makes of it as it is imported
        raise NotImplementedError(f"{cls.__qualname__} was not imported; see vpnd/lean.py")


def _left_out(place: str, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    # an exception, since it may be one that somebody catches
    return _Kind(name, (Exception,), {"__qualname__": place, "__class_getitem__": classmethod(_itself)})


def _itself(cls: type, _: Any) -> type:
    return cls


class _Empty(ModuleType):
    __path__: MutableSequence[str] = []

    def __getattr__(self, name: str) -> type:
        return _left_out(f"{self.__name__}.{name}", name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Import without these modules, and what is below them. For whole processes: their importers keep it so."""
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
