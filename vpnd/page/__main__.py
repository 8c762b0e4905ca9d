"""`python -m vpnd.page CHANNEL_FD`."""

from __future__ import annotations

from vpnd.page.process import main

main()
