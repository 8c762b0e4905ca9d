"""`vpnd page`: where the node's page is."""

from __future__ import annotations

import typer

from vpnd.cli.command import Where, command
from vpnd.config import paths
from vpnd.errors import ConfigError, NotRunningError, PrivilegeError

app = typer.Typer()


@command(app)
def page(place: Where) -> None:
    """Print the address of the page that shows the node live, with the token that opens it. Needs web.listen."""
    config = place.load("web").config
    if not config.web.listen:
        raise ConfigError(
            'web.listen is empty, so the node has no page; set it to "127.0.0.1:9587" and start the node again'
        )
    file = paths.page_token_file(config)
    try:
        token = file.read_text().strip()
    except FileNotFoundError:
        raise NotRunningError(f"{file}: is not there; a node makes it that starts with web.listen") from None
    except PermissionError:
        raise PrivilegeError(f"{file} is not open to this user; run with sudo") from None
    typer.echo(f"http://{config.web.listen}/#{token}")
