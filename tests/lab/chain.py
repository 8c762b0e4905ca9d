"""An Ethereum endpoint of which only one function of one contract is made up: getPeer(uint256), from a file.

A program (`python chain.py DIRECTORY HOST PORT`) that needs nothing but the standard library, and `Chain`, which
tells it what to answer. Which addresses were asked for is in a file as well.
"""

from __future__ import annotations

import http.server
import ipaddress
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CONTRACT = "0x" + "ab" * 20
GET_PEER = "0x67ebb6b2"
OWNERS, ASKED = "owners.json", "asked"
#: How a mode of failing lasts longer than any patience.
FOR_EVER_S = 3600.0


class Chain:
    """`directory` is its own. `command` starts it; whose process it is, and where, is the caller's."""

    def __init__(self, directory: Path, host: str, port: int) -> None:
        self._directory, self._where = directory, (host, port)
        self.owners: dict[str, str] = {}
        self.mode = "up"
        self._write()
        (directory / ASKED).touch()

    @property
    def settings(self) -> dict[str, Any]:
        """The [registry] that asks it, with lifetimes so short that a test need not wait."""
        host, port = self._where
        return {
            "kind": "contract",
            "rpc_url": f"http://{host}:{port}/",
            "contract_address": CONTRACT,
            "positive_lifetime": 0.4,
            "negative_lifetime": 0.2,
            "failure_lifetime": 0.1,
        }

    def command(self) -> list[str]:
        """How it is run."""
        host, port = self._where
        return [sys.executable, __file__, str(self._directory), host, str(port)]

    def give(self, address: str, peer_id: str) -> None:
        """From now on that peer has the address; "" for nobody."""
        self.owners[address] = peer_id
        self._write()

    def turn(self, mode: str) -> None:
        """up, down (errors of HTTP), hang (no answer), lie (answers to other questions)."""
        self.mode = mode
        self._write()

    def asked(self) -> list[str]:
        """Every address that was asked for, in order."""
        return (self._directory / ASKED).read_text().split()

    def _write(self) -> None:
        fresh = self._directory / "fresh"
        fresh.write_text(json.dumps({"mode": self.mode, "owners": self.owners}))
        fresh.rename(self._directory / OWNERS)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request after the other on a connection, as real endpoints have it."""

    protocol_version = "HTTP/1.1"
    directory = Path()

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = question["params"][0]
        assert (
            question["method"] == "eth_call" and call["to"] == CONTRACT and call["data"].startswith(GET_PEER)
        )
        address = str(ipaddress.IPv4Address(int(call["data"][len(GET_PEER) :], 16)))
        with (self.directory / ASKED).open("a") as asked:
            asked.write(f"{address}\n")
        state = json.loads((self.directory / OWNERS).read_text())
        if state["mode"] == "hang":
            time.sleep(FOR_EVER_S)
        serial = question["id"] + (1 if state["mode"] == "lie" else 0)
        body = json.dumps(
            {"jsonrpc": "2.0", "id": serial, "result": abi(state["owners"].get(address, ""))}
        ).encode()
        if state["mode"] == "down":
            body = b"out of order"
        self.send_response(503 if state["mode"] == "down" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


def abi(text: str) -> str:
    """A string as a Solidity function returns it."""
    data = text.encode()
    words = (32).to_bytes(32, "big") + len(data).to_bytes(32, "big") + data + bytes(-len(data) % 32)
    return f"0x{words.hex()}"


def main() -> None:
    directory, host, port = sys.argv[1:]
    Handler.directory = Path(directory)
    os.chdir("/")
    http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
