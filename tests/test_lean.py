"""What is left out of an import, and that nothing else is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from vpnd import interfaces, lean

LIBRARY = '''"""Of the module."""
try:
    import lean_spare
except ImportError:
    lean_spare = None
from lean_part.inner import Thing, NUMBER
import lean_part.inner as inner
TEXT = "Of the module."


class Documented:
    """Of the class."""

    text = "of no class"

    def method(self):
        """Of the method."""
        return "of the result"


class Same:
    """Of both."""

    text = "Of both."


def first():
    return "not a docstring"


def checked(value):
    """Of the check."""
    assert value
    return [lambda: "in a list" for _ in range(1)][0]()


async def later():
    """Of what is later."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "lean_library.py").write_text(LIBRARY)
    (tmp_path / "lean_spare.py").write_text("")
    (tmp_path / "lean_part").mkdir()
    (tmp_path / "lean_part" / "__init__.py").write_text("")
    (tmp_path / "lean_part" / "inner.py").write_text("class Thing: ...\nNUMBER = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "lean_library"
    for name in [name for name in sys.modules if name.startswith("lean_")]:
        del sys.modules[name]


def lean_import(name: str) -> ModuleType:
    with lean.without("lean_part", missing=("lean_spare",)):
        return importlib.import_module(name)


def test_what_is_left_out_is_one_class_for_all_that_nobody_can_make(library: str) -> None:
    module = lean_import(library)
    assert module.Thing is module.inner.Thing
    assert int(module.NUMBER) == 0, "modules in C take numbers at once"
    assert not isinstance(module, module.Thing)
    with pytest.raises(NotImplementedError, match="lean_part.inner.Thing was not imported"):
        module.Thing()


def test_what_is_given_back_is_imported_by_who_comes_later(library: str) -> None:
    lean_import(library)
    assert int(importlib.import_module("lean_part.inner").NUMBER) == 0
    lean.give_back("lean_part")
    assert importlib.import_module("lean_part.inner").NUMBER == 7
    assert importlib.import_module("lean_part").inner.Thing()


def test_what_is_said_to_be_missing_is_there_for_others(library: str) -> None:
    assert lean_import(library).lean_spare is None
    assert importlib.import_module("lean_spare")


def test_docstrings_are_left_out_and_nothing_else(library: str) -> None:
    module = lean_import(library)
    documented = module.Documented
    for thing in (documented.method, module.checked, module.later):
        assert thing.__doc__ is None
    assert documented.__doc__ == " "
    assert module.TEXT == "Of the module."
    assert (documented.text, documented().method()) == ("of no class", "of the result")
    assert module.Same.text == "Of both."
    assert module.first() == "not a docstring"
    assert module.checked(True) == "in a list"
    with pytest.raises(AssertionError):
        module.checked(False)


def test_imports_have_docstrings_again_afterwards(library: str) -> None:
    with lean.without(), lean.without():
        importlib.import_module("lean_spare")
    assert importlib.import_module(library).checked.__doc__ == "Of the check."


#: The program of a process, and what it must not have imported.
LEAN = [
    ("import vpnd.control.main", "Crypto email httpx psutil _ssl zipfile _hashlib"),
    (
        "with lean.without(missing=lean.SPARE): from vpnd.cli.daemon import UNUSED\n"
        "with lean.without(*UNUSED, missing=lean.SPARE): import supervisor.service",
        "cryptography email psutil _ssl tempfile typing_extensions zipfile _hashlib",
    ),
    (
        "import vpnd.nursery\n"
        "with lean.without(*lean.IDLE, missing=lean.SPARE): import shards.main, vpnd.relay.main",
        "bz2 email psutil pyroute2 _ssl typing_extensions zipfile _hashlib",
    ),
]


@pytest.mark.parametrize(("program", "unwanted"), LEAN, ids=["control", "supervisor", "nursery"])
def test_a_process_does_not_import_what_it_does_not_use(program: str, unwanted: str) -> None:
    tell = "import sys\nprint(*(name for name, module in sys.modules.items() if module is not None))"
    words = [sys.executable, "-P", "-c", f"from vpnd import lean\n{program}\n{tell}"]
    imported = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert sorted({*unwanted.split()} & {*imported}) == []


def test_interfaces_have_the_addresses_that_others_see() -> None:
    seen = {
        (name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family.name in ("AF_INET", "AF_INET6")
    }
    held = interfaces.addresses()
    assert {(name, str(address.ip)) for name, address in held} == seen
    assert ("lo", "127.0.0.0/8") in {(name, str(address.network)) for name, address in held}


def test_who_asks_a_contract_speaks_tls() -> None:
    program = (
        "import vpnd.control.main, vpnd.adapter.contract, ssl, trio\n"
        "assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED\n"
        "assert issubclass(trio.SSLStream, trio.abc.Stream)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
