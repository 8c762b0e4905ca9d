"""Rules of the tree that are not about behaviour: which way imports point, and how long a file may be.

Imports are read from the syntax tree, those inside functions too: a lazy import is still an arrow.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
SOURCES = sorted(path for name in ("vpnd", "shards", "supervisor") for path in (ROOT / name).rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "tests").rglob("*.py"))

#: The entry points may start what the shared modules must not know.
FACES = {"vpnd", "vpnd.__main__"}
#: What a sans-IO engine has no use for.
WORLD = {"asyncio", "trio", "socket", "select", "selectors", "time", "os", "logging", "threading", "ssl"}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = set(map(module, SOURCES))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """Modules a file imports; with `typing_too` also those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if not typing_too and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it points"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names)
            if not names <= MODULES:  # something of the module itself
                found.add(node.module or "")
    return found


def breaches(offends) -> list[str]:
    """`offends(importing module, imported module)` of every import of the product."""
    return sorted(
        f"{module(path)} imports {imported}"
        for path in SOURCES
        for imported in imports(path)
        if offends(module(path), imported)
    )


ARROWS = [
    (
        "supervisor starts shards but never imports them",
        lambda here, there: within(here, "supervisor") and within(there, "shards"),
    ),
    (
        "shards know nothing of the supervisor",
        lambda here, there: within(here, "shards") and within(there, "supervisor"),
    ),
    (
        "the relay process knows no other process, and none knows it",
        lambda here, there: (
            (
                within(here, "vpnd.relay")
                and within(there, "supervisor", "shards", "vpnd.control", "vpnd.adapter")
            )
            or (within(there, "relay") and not within(here, "vpnd.relay"))
        ),
    ),
    (
        "shared modules know neither supervisor nor shards",
        lambda here, there: (
            within(here, "vpnd")
            and not within(here, "vpnd.cli")
            and here not in FACES
            and within(there, "supervisor", "shards")
        ),
    ),
    (
        "the command line never reaches into a shard",
        lambda here, there: within(here, "vpnd.cli") and within(there, "shards"),
    ),
    (
        "libp2p and trio are control's alone, behind the adapter",
        lambda here, there: (
            within(there, "libp2p", "trio", "multiaddr", "anyio")
            and not within(here, "vpnd.adapter", "vpnd.control")
        ),
    ),
    (
        "shared modules stay off asyncio, but for the one that puts a channel on it; the relay is a process",
        lambda here, there: (
            within(here, "vpnd")
            and not within(here, "vpnd.api.aio", "vpnd.relay")
            and within(there, "asyncio")
        ),
    ),
    (
        "control and adapter run on trio and never meet asyncio",
        lambda here, there: (
            within(here, "vpnd.control", "vpnd.adapter") and within(there, "asyncio", "vpnd.api.aio")
        ),
    ),
    (
        "children and supervisor do not need the command line",
        lambda here, there: (
            within(there, "vpnd.cli", "typer") and not within(here, "vpnd.cli") and here not in FACES
        ),
    ),
    (
        "configuration and identity are read without control and adapter",
        lambda here, there: (
            within(here, "vpnd.config", "vpnd.identity", "vpnd.peerid", "vpnd.cli")
            and within(there, "vpnd.control", "vpnd.adapter")
        ),
    ),
]


@pytest.mark.parametrize(("rule", "offends"), ARROWS, ids=[rule for rule, _ in ARROWS])
def test_imports_point_one_way(rule, offends):
    assert breaches(offends) == []


def circles() -> list[list[str]]:
    """Modules that import each other in a circle, for their types alone or not."""
    paths = {module(path): path for path in SOURCES}
    arrows = {
        here: {there for there in imports(path, typing_too=True) if there in paths and there != here}
        for here, path in paths.items()
    }

    def reached(here: str) -> set[str]:
        found: set[str] = set()
        new = arrows[here]
        while new:
            found |= new
            new = {further for there in new for further in arrows[there]} - found
        return found

    reach = {here: reached(here) for here in paths}
    return [
        sorted(there for there in reach[here] if here in reach[there])
        for here in sorted(paths)
        if here in reach[here]
    ]


def test_no_modules_import_each_other_in_a_circle():
    assert circles() == []


#: A module of a room may import what stands below it; rooms of one line know nothing of each other.
STOREYS = [
    ("shards.main",),
    ("shards.control", "shards.answers"),
    ("shards.plane",),
    ("shards.peer", "shards.session"),
    ("shards.outbound", "shards.inbound", "shards.unreachable"),
    ("shards.flow",),
    ("shards.budget", "shards.counters", "shards.stream", "shards.datagram"),
]


def test_rooms_of_a_shard_import_only_what_is_below_them():
    storey = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}

    def room(name: str) -> str | None:
        return next((room for room in storey if within(name, room)), None)

    def offends(here: str, there: str) -> bool:
        one, other = room(here), room(there)
        return one is not None and other is not None and one != other and storey[one] >= storey[other]

    assert breaches(offends) == []


def test_the_engines_of_sessions_and_datagrams_are_bytes_in_and_bytes_out():
    engines = "shards.stream", "shards.datagram"
    assert breaches(lambda here, there: within(here, *engines) and there.partition(".")[0] in WORLD) == []


@pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(ROOT)) for path in ALL])
def test_a_file_is_short_enough_to_have_one_job(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_a_module_says_what_it_is_for(path):
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def late_attributes(path: Path) -> list[str]:
    """What methods assign to `self` that neither `__init__` nor the class itself makes."""
    late = []
    for kind in ast.walk(ast.parse(path.read_text())):
        if not isinstance(kind, ast.ClassDef):
            continue
        made = {node.target.id for node in kind.body if isinstance(node, ast.AnnAssign)}
        assigned = {
            (method.name, node.attr)
            for method in kind.body
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if isinstance(node.value, ast.Name) and node.value.id == "self"
        }
        made |= {attribute for method, attribute in assigned if method == "__init__"}
        late += [f"{kind.name}.{attribute}" for _, attribute in assigned if attribute not in made]
    return sorted(late)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_an_object_is_complete_when_it_is_made(path):
    """Whoever needs what is not there yet is made later, by a function that returns it finished."""
    assert late_attributes(path) == []


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports those of folders that are no packages by their names alone, and refuses the second."""
    places: dict[str, list[str]] = {}
    for file in Path(__file__).parent.rglob("test_*.py"):
        if not (file.parent / "__init__.py").exists():
            places.setdefault(file.name, []).append(str(file.parent))
    assert {name: several for name, several in places.items() if len(several) > 1} == {}
