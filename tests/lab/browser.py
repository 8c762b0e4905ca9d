"""Headless Chromium in a namespace of the lab, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .network import LabError, Namespace

COMMAND = "chromium"
ANSWER_S = 60.0


class Browser:
    """One browser with one page. A context manager; its profile is below `directory`."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        if not shutil.which(COMMAND):
            raise LabError(f"{COMMAND} is not installed")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; other shells take numbers of one digit only
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = [COMMAND, *options, f"--user-data-dir={directory / 'browser'}", "about:blank"]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", namespace.name, "bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(directory)},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb", buffering=0)
        self._numbers = itertools.count(1)
        self._session = ""
        #: what the page's scripts complained of
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def open(self, url: str) -> None:
        """Go to another page; returns when it has begun to load."""
        self._call("Page.navigate", url=url)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Of the page, in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page. Raises LabError when it throws."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise LabError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline_s:
            said = json.loads(self._read())
            if said.get("id") == number:
                if "error" in said:
                    raise LabError(f"{method}: {said['error']}")
                return dict(said["result"])
            self._note(said)
        raise LabError(f"{method}: no answer in {ANSWER_S} s")

    def _note(self, said: dict[str, Any]) -> None:
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(said["params"]["exceptionDetails"]))
            case "Log.entryAdded" if said["params"]["entry"]["level"] == "error":
                self.errors.append(str(said["params"]["entry"]["text"]))

    def _read(self) -> bytes:
        read = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise LabError(f"{COMMAND} has ended")
            read += byte
        return bytes(read)
