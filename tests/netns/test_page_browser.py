"""The page of a real node in a real browser. VPND_LONG_TESTS=1; needs chromium."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from lab import Node, running_nodes, wait_until
from lab.browser import COMMAND, Browser

pytestmark = [
    pytest.mark.root,
    pytest.mark.long("takes half a minute"),
    pytest.mark.skipif(not shutil.which(COMMAND), reason=f"needs {COMMAND}"),
]

PAGE = "127.0.0.1:9587"
SOON_S = 30.0
#: Pictures to look at are left here, if it is set.
PICTURES = os.environ.get("VPND_PICTURES", "")


@pytest.mark.timeout(180)
def test_the_page_shows_the_mesh_and_its_traffic_at_a_glance() -> None:
    def change(nodes: list[Node]) -> None:
        nodes[0].config["web"] = {"listen": PAGE}

    with running_nodes(3, change=change) as nodes:
        a, b, c = nodes
        lab = a.lab
        address = a.vpnd("page").stdout.strip()
        traffic = []
        for node, options in ((b, ["-b", "200M"]), (c, ["-R", "-b", "50M"])):
            traffic.append(lab.spawn(node.namespace, "iperf3", "-s", "-1"))
            wait_until(
                lambda node=node: "5201" in lab.run(node.namespace, "ss", "-Hltn").stdout, SOON_S, "iperf3"
            )
            command = ["iperf3", "-c", node.virtual_ip, "-t", "40", "-C", "cubic", *options]
            traffic.append(lab.spawn(a.namespace, *command))
        with Browser(a.namespace, lab.directory) as browser:
            browser.open(f"http://{PAGE}/")
            wait_until(lambda: "needs its token" in text(browser), SOON_S, "it says that a token is missing")
            browser.errors.clear()  # of the 401
            browser.open(address)
            browser.resize(1200, 900)
            wait_until(lambda: "Mbit/s" in svg(browser), SOON_S, "traffic is on the paths")
            assert {"b", "c", "ms", b.virtual_ip, c.virtual_ip} <= set(svg(browser).split())
            assert "2 of 2 peers connected" in text(browser) and "healthy" in text(browser)
            assert "#" not in browser.evaluate("location.href"), "the token is out of sight"
            picture(browser, "desktop")
            browser.resize(390, 844, phone=True)
            wait_until(
                lambda: browser.evaluate("document.documentElement.scrollWidth <= innerWidth"),
                SOON_S,
                "it fits a phone's width",
            )
            picture(browser, "phone")
            b.kill()
            wait_until(lambda: "1 of 2 peers connected" in text(browser), SOON_S, "who is gone is seen")
            wait_until(lambda: "last seen" in text(browser), SOON_S, "and since when")
            picture(browser, "gone")
            assert browser.errors == []
        for process in traffic:
            process.kill()


def text(browser: Browser) -> str:
    return str(browser.evaluate("document.body?.innerText"))


def svg(browser: Browser) -> str:
    shown = "[...document.querySelectorAll('#mesh text')].map(each => each.textContent).join(' ')"
    return str(browser.evaluate(shown))


def picture(browser: Browser, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(exist_ok=True)
        browser.screenshot(Path(PICTURES, f"page-{name}.png"))
