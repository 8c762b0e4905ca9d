"""Importing without what is never used: parts of libraries, and docstrings.

Libraries import all they have, and what they need for it: of control's memory that was half, of the supervisor's a
quarter. `without` puts an empty module in the place of each part that is named: every name can be imported from it, and
stands for a class that nothing is an instance of, and that cannot be made once the import is over. What importers know
to do without is said to be missing instead.
"""

from __future__ import annotations

import abc
import contextlib
import dis
import gc
import importlib.machinery
import sys
from collections.abc import Iterator, MutableSequence, Sequence
from types import CodeType, ModuleType
from typing import Any

#: Of Python, for TLS, and for what of `inspect` nothing asks for.
IDLE = ("ast", "ssl")
#: What its importers find a way without: OpenSSL for hashes, which Python has itself, and typing of later Pythons.
SPARE = ("_hashlib", "typing_extensions")

#: Numbers of instructions, by which a docstring is told from other constants.
_LOAD, _STORE, _EXTENDED = (dis.opmap[name] for name in ("LOAD_CONST", "STORE_NAME", "EXTENDED_ARG"))
#: CPython Include/cpython/code.h: of functions, not of classes and modules.
_CO_OPTIMIZED = 0x1


class _Kind(abc.ABCMeta):
    """Of classes that are left out: what is asked of one is left out, too."""

    def __getattr__(cls, name: str) -> Any:
        return _left_out(f"{cls.__qualname__}.{name}", name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return cls  # what a module makes of it as it is imported
        raise NotImplementedError(f"{cls.__qualname__} was not imported; see vpnd/lean.py")

    def __int__(cls) -> int:
        return 0  # of numbers, which modules in C take at once


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
        made = _left_out(f"{self.__name__}.{name}", name)
        setattr(self, name, made)  # one for all who import it
        return made


class _Finder:
    """A finder and loader, as importlib wants them. Owes nothing to importlib.abc, which would bring two megabytes."""

    def __init__(self, names: Sequence[str], missing: Sequence[str]) -> None:
        self._names, self._missing = names, missing

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self._missing:
            raise ModuleNotFoundError(f"{fullname} is left out; see vpnd/lean.py", name=fullname)
        if _is_below(fullname, self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def _is_below(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


@contextlib.contextmanager
def without(*names: str, missing: Sequence[str] = ()) -> Iterator[None]:
    """Import without these modules and what is below them, and without docstrings. For whole processes: their
    importers keep it so.

    `missing`: modules that whoever imports them meanwhile is told do not exist.
    """
    finder = _Finder(names, missing)
    loader = importlib.machinery.SourceFileLoader
    read = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> CodeType | None:
        code = read(self, fullname)
        return code and _undocumented(code)

    sys.meta_path.insert(0, finder)
    loader.get_code = get_code  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        loader.get_code = read  # type: ignore[method-assign]
        sys.meta_path.remove(finder)


def give_back(*names: str) -> None:
    """Let whoever imports these from now on have them."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, _Empty) and _is_below(name, names):
            del sys.modules[name]
            above, _, own = name.rpartition(".")
            vars(sys.modules.get(above, module)).pop(own, None)


def settle() -> None:
    """Everything is imported, for which the collector was disabled: forget which files there are, of which importing
    keeps a list, and have no collection look at what stays for ever."""
    sys.path_importer_cache.clear()
    gc.freeze()
    gc.enable()


def _undocumented(code: CodeType) -> CodeType:
    changed: list[Any] | None = None
    place = _docstring(code)
    if place >= 0:
        changed = list(code.co_consts)
        # of a class: the dataclasses of Python make one where there is none
        changed[place] = None if code.co_flags & _CO_OPTIMIZED else " "
    for at, const in enumerate(code.co_consts):
        if isinstance(const, CodeType) and (inner := _undocumented(const)) is not const:
            changed = list(code.co_consts) if changed is None else changed
            changed[at] = inner
    return code if changed is None else code.replace(co_consts=tuple(changed))


def _docstring(code: CodeType) -> int:
    """Which of its constants is the docstring, and nothing else; -1: none, or it cannot be told."""
    consts, names = code.co_consts, code.co_names
    if code.co_flags & _CO_OPTIMIZED:  # the first, and never loaded
        is_text = bool(consts) and isinstance(consts[0], str)
        return 0 if is_text and bytes((_LOAD, 0)) not in code.co_code else -1
    if "__doc__" not in names:
        return -1
    words = code.co_code
    load = words.find(bytes((_STORE, names.index("__doc__")))) - 2
    if load < 0 or load % 2 or words[load] != _LOAD or (load and words[load - 2] == _EXTENDED):
        return -1
    return words[load + 1] if words.count(words[load : load + 2]) == 1 else -1
