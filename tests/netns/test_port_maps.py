"""Routers that give ports, and joining where there is none: nobody has to be reachable but one member that relays."""

from __future__ import annotations

import re
import signal

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until
from lab.joining import address, join, machine
from lab.nat import NatLab
from test_nat import paths

pytestmark = pytest.mark.root

PATIENCE_S = 40.0
SETTINGS = {
    "nat": {
        "reach_delay": "300ms",
        "reach_interval": "2s",
        "map_retry": "1s",
        "map_lifetime": "2m",
        "upgrade_interval": "2s",
    }
}


def reach(node: Node) -> dict[str, object]:
    return dict(node.ask().get("reach") or {})


def forwarded(lab: NatLab, gateway: int) -> list[str]:
    """The ports that a gateway leads inward."""
    name = lab.gateways[gateway - 1]
    rules = lab.run(name, "nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd").stdout
    return re.findall(r"dnat ip to ([0-9.]+:[0-9]+)", rules)


def test_a_port_of_the_router_makes_a_member_one_that_can_be_dialed() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=10.0) as lab:
        lab.map_ports(1)
        lab.nat(2, "fully")
        r, a, b = (machine(lab, place, SETTINGS) for place in range(3))
        r.start()
        r.wait_ready()
        join(r, a)
        wait_until(lambda: reach(a).get("reachable") == "yes", PATIENCE_S, "a knows that it can be dialed")
        assert reach(a)["port_map"] == "44.1.2.3:4001 by PCP"
        assert forwarded(lab, 1) == ["10.1.0.2:4001"]
        # what it tells others is where it was reached, not what the router thinks that it is
        listen = a.ask()["node"]["listen"]
        assert "/ip4/203.0.113.1/tcp/4001" in listen and "/ip4/44.1.2.3/tcp/4001" not in listen
        wait_until(lambda: reach(r).get("reachable") == "yes", PATIENCE_S, "r knows it, too")
        assert reach(r)["mapping"] == "none"

        # whoever is behind the worst of NATs needs no relay to a
        join(r, b)
        wait_for_answer(lab, b.namespace, address(a), PATIENCE_S)
        wait_until(lambda: paths(b, "a") == ["direct 203.0.113.1:4001"], PATIENCE_S, "b has dialed a")
        wait_until(lambda: reach(b).get("reachable") == "no", PATIENCE_S, "b knows that it cannot be dialed")
        assert reach(b)["mapping"] == "random"
        told = b.vpnd("netcheck").stdout
        assert "symmetric" in told and "forward TCP port 4001" in told and "relays of this node" in told
        assert "44.1.2.3:4001 by PCP" in a.vpnd("netcheck").stdout

        # the router starts again, and has forgotten all; by UPnP alone now
        lab.routers[1].send_signal(signal.SIGTERM)
        lab.routers[1].wait()
        lab.nat(1, "masq")
        lab.map_ports(1, pcp=False)
        a.config["nat"]["map_ports"] = False
        a.write_config()
        a.vpnd("reload")
        wait_until(lambda: not reach(a)["port_map"], PATIENCE_S, "a asks for no port any more")
        a.config["nat"]["map_ports"] = True
        a.write_config()
        a.vpnd("reload")
        wait_until(lambda: str(reach(a)["port_map"]).endswith("by UPnP"), PATIENCE_S, "a has a port by UPnP")
        assert forwarded(lab, 1) == ["10.1.0.2:4001"]

        # it is given back
        assert a.stop() == 0
        assert forwarded(lab, 1) == []
        check_logs([r, b])


def test_a_token_of_an_authority_behind_a_nat_is_good_for_a_machine_behind_another() -> None:
    with NatLab(hidden=(2, 1), rtt_ms=10.0) as lab:
        for gateway in (1, 2):
            lab.nat(gateway, "fully")
        r, a, c, b = (machine(lab, place, SETTINGS) for place in range(4))
        r.start()
        r.wait_ready()
        join(r, a)
        r.vpnd("authority", "add", "a")
        wait_until(lambda: (a.ask().get("network") or {}).get("authority"), PATIENCE_S, "a may let others in")
        wait_until(lambda: reach(a).get("reachable") == "no", PATIENCE_S, "a knows that nobody can dial it")
        wait_until(lambda: reach(a).get("relays") == ["r"], PATIENCE_S, "r relays for a")

        invited = a.vpnd("invite", "--name", "b")
        assert "over r" in invited.stderr
        b.start("--join", invited.stdout.strip())
        b.wait_ready(PATIENCE_S)
        wait_for_answer(lab, b.namespace, address(a), PATIENCE_S)
        assert all(path.startswith("relayed via r") for path in paths(b, "a"))
        # it was for one machine
        wrong = invited.stdout.strip()
        c.config["membership"] = {"join_timeout": "3s"}
        c.start("--join", wrong)
        assert c.wait_ended(PATIENCE_S) == 8
        check_logs([r, a, b])
