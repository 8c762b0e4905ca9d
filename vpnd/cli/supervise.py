"""`python -m vpnd.cli.supervise GIVEN`: what `vpnd start` becomes; see vpnd/cli/daemon.py."""

from __future__ import annotations

import sys

from vpnd import lean

if __name__ == "__main__":
    with lean.without(missing=lean.SPARE):
        from vpnd.cli import main
        from vpnd.cli.daemon import run
    sys.exit(main(sys.argv[1:], run))
