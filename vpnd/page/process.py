"""page: the process that answers HTTP on web.listen, with what the supervisor tells it.

    talks to     over                            what comes, and who serves it
    -----------  ------------------------------  ---------------------------------------------------------
    supervisor   channel (inherited descriptor)  serving: ExporterStart, Reconfigure, StatusTold, Stop
    browsers     HTTP, the socket it is given    Handler: /, /page.js, /page.css, /events

Rights kept after `privileges.drop`: the channel and the listening socket. How it is served: vpnd/serving.py.

The page itself says nothing and is everybody's. /events, what the node does, is for who shows the token: it is behind
the "#" of the address that `vpnd page` prints, where browsers keep it to themselves, and comes back in a header that no
other site can make a browser send. Requests for a name that is not ours are refused: a site whose name leads here for a
moment (DNS rebinding) would have a browser's confidence.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from importlib import resources

import msgspec

from vpnd import serving
from vpnd.config.schema import Config
from vpnd.errors import VpndError
from vpnd.page.view import view
from vpnd.status import Status

#: Path -> file beside this one, and its type; read before the files may be out of reach.
FILES = {
    path: (resources.files("vpnd.page").joinpath(name).read_bytes(), f"{kind}; charset=utf-8")
    for path, name, kind in (
        ("/", "page.html", "text/html"),
        ("/page.js", "page.js", "text/javascript"),
        ("/page.css", "page.css", "text/css"),
    )
}
#: Nothing from elsewhere, nothing inside the page itself, in nobody's frame.
HEADERS = {
    "Content_Security_Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X_Content_Type_Options": "nosniff",
    "Referrer_Policy": "no-referrer",
    "Cache_Control": "no-store",
}
SCHEME = "Bearer "


class Refused(VpndError):
    """A request that is not answered; the text says why. `code` is HTTP's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def main() -> None:
    """See the module's docstring."""
    serving.serve("page", _limits, Handler)


def _limits(config: Config) -> serving.Limits:
    web = config.web
    return serving.Limits(web.interval, web.timeout, web.max_clients)


def _event(status: Status, max_peers: int) -> bytes:
    return b"data: " + msgspec.json.encode(view(status, max_peers)) + b"\n\n"


def check_host_untrusted(host: str, listen: str) -> None:
    """Raise Refused for a Host header that is neither an address, nor localhost, nor the host of web.listen."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    ours = listen.rpartition(":")[0].strip("[]")
    if name and name.lower() in ("localhost", ours.lower()):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise Refused(421, f"this is not {name[:100]!a}; use an address, or localhost") from None


def check_token_untrusted(authorization: str, token: str) -> None:
    """Raise Refused for an Authorization header without the token. How long it takes tells nothing of the token."""
    given = authorization.removeprefix(SCHEME).encode(errors="replace")
    if not token or not authorization.startswith(SCHEME) or not hmac.compare_digest(given, token.encode()):
        raise Refused(401, "show the token: `vpnd page` prints the address with it")


class Handler(serving.Handler):
    """One connection, one request."""

    def do_GET(self) -> None:
        """The files of the page; /events, a snapshot every web.interval as server-sent events."""
        told = self.server.told
        path = self.path.partition("?")[0]
        try:
            check_host_untrusted(self.headers.get("Host", ""), told.config.web.listen)
            if path in FILES:
                self.answer(200, *FILES[path], **HEADERS)
            elif path == "/events":
                check_token_untrusted(self.headers.get("Authorization", ""), told.token)
                self._tell_events()
            else:
                raise Refused(404, "there is / and what belongs to it")
        except Refused as refusal:
            self.answer(refusal.code, f"{refusal}\n", **HEADERS)

    do_HEAD = do_GET

    def _tell_events(self) -> None:
        """Until the browser is gone, or takes nothing for web.timeout."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        for name, value in HEADERS.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        told = self.server.told
        while self.command != "HEAD":
            status, most = told.status(), told.config.web.max_peers
            if status is None:
                self.wfile.write(b"data: null\n\n")
            else:
                self.wfile.write(told.made(status, "event", lambda: _event(status, most)))  # noqa: B023 - called at once
            time.sleep(told.limits.max_age_s)
