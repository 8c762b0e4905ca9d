"""Starting a script of this tree with the tree's own interpreter, whatever `python3` is."""

from __future__ import annotations

import os
import subprocess
import sys

from .node import ROOT, script_command

VENV = ROOT / ".venv"


def use_venv() -> None:
    """Go on in .venv's Python: makes .venv first when there is none, then runs this very command again in it.

    Returns when this is that interpreter already. Ends the program when .venv cannot be made; the reason is
    on standard error then.
    """
    python = VENV / "bin" / "python"
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        return
    if not python.exists() and subprocess.run([*script_command(), "version"], stdout=sys.stderr).returncode:
        raise SystemExit(1)
    os.execv(python, [str(python), *sys.argv])
