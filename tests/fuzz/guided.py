"""One fuzz entry, guided by coverage: `python -m fuzz.guided NAME [libFuzzer options]`, run in tests/.

Needs atheris (`pip install atheris`), which is a tool for who looks for faults, not a dependency.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("", "membership", "names"))]

with atheris.instrument_imports(include=["vpnd", "shards", "supervisor"]):
    from fuzz.entries import ENTRIES


def main() -> None:
    name, *options = sys.argv[1:]
    entry = ENTRIES[name]

    def one(data: bytes) -> None:
        try:
            entry.run(data)
        except entry.errors:
            return

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(entry.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
