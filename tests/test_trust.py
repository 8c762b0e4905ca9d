"""What another user could change is not obeyed by root, and what lies in the way of our files is not followed."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor import statedir
from supervisor.statusd import StatusServer
from vpnd import trust
from vpnd.cli.app import run
from vpnd.config.load import from_mapping
from vpnd.errors import ConfigError, MachineError

NOBODY = pwd.getpwnam("nobody").pw_uid
TIMEOUT_S = 1.0


def make(path: Path, *, owner: int = 0, mode: int = 0o700) -> Path:
    path.mkdir(parents=True)
    os.chown(path, owner, 0)
    path.chmod(mode)
    return path


def of_nobody(root: Path) -> Path:
    return make(root / "state", owner=NOBODY)


def open_to_all(root: Path) -> Path:
    return make(root / "state", mode=0o777)


def open_and_sticky(root: Path) -> Path:
    return make(root / "state", mode=0o1777)


def open_to_a_group(root: Path) -> Path:
    path = make(root / "state", mode=0o770)
    os.chown(path, 0, pwd.getpwnam("nobody").pw_gid)
    return path


def below_somebody(root: Path) -> Path:
    return make(make(root / "home", owner=NOBODY) / "state")


def missing_below_somebody(root: Path) -> Path:
    return make(root / "home", owner=NOBODY) / "state"


def by_a_link_of_somebody(root: Path) -> Path:
    make(root / "target")
    link = make(root / "tmp", mode=0o1777) / "state"
    link.symlink_to(root / "target")
    os.lchown(link, NOBODY, 0)
    return link


def by_a_link_to_somebody(root: Path) -> Path:
    of_nobody(root)
    (root / "link").symlink_to("./state")
    return root / "link"


STOLEN = [
    of_nobody,
    open_to_all,
    open_and_sticky,
    open_to_a_group,
    below_somebody,
    missing_below_somebody,
    by_a_link_of_somebody,
    by_a_link_to_somebody,
]


@pytest.mark.root
@pytest.mark.parametrize("place", STOLEN)
@pytest.mark.parametrize("command", ["start", "id", "status", "stop", "leave"])
def test_a_state_directory_of_somebody_else_is_refused_by_every_command(
    tmp_path: Path, place: Callable[[Path], Path], command: str
) -> None:
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="state directory") as refused:
        run(["--state-dir", str(path), command])
    assert "nobody" in str(refused.value) or "written by others" in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.root
def test_an_embedded_node_refuses_it_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to nobody"):
        statedir.lock(from_mapping({}, of_nobody(tmp_path)))
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.root
def test_links_and_sticky_directories_of_root_are_as_good_as_any(tmp_path: Path) -> None:
    make(make(tmp_path / "tmp", mode=0o1777) / "state")
    (tmp_path / "link").symlink_to("tmp/../tmp")
    trust.check(tmp_path / "link" / "state", "state directory")
    trust.check(tmp_path / "link" / "state" / "missing" / "below", "state directory")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match="leads nowhere"):
        trust.check(tmp_path / "round", "state directory")


@pytest.mark.root
@pytest.mark.parametrize("spoil", [lambda path: os.chown(path, NOBODY, 0), lambda path: path.chmod(0o666)])
def test_settings_that_somebody_else_could_write_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    file = tmp_path / "vpnd.toml"
    file.write_text('[node]\nname = "x"\n')
    assert run(["--state-dir", str(tmp_path), "config", "check"]) == 0
    spoil(file)
    for words in (
        ["--state-dir", str(tmp_path)],
        ["--config", str(file), "--state-dir", str(tmp_path / "x")],
    ):
        with pytest.raises(ConfigError, match="configuration file"):
            run([*words, "config", "check"])


@pytest.mark.root
def test_an_identity_that_somebody_else_could_exchange_is_refused(tmp_path: Path) -> None:
    (make(tmp_path / "theirs", owner=NOBODY) / "identity.pem").touch()
    make(tmp_path / "state")
    (tmp_path / "state" / "vpnd.toml").write_text(
        f'[p2p]\nidentity_file = "{tmp_path}/theirs/identity.pem"\n'
    )
    with pytest.raises(ConfigError, match=r"identity file .*belongs to nobody"):
        run(["--state-dir", str(tmp_path / "state"), "id"])


@pytest.mark.root
@pytest.mark.parametrize("name", ["vpnd.lock", "vpnd.log"])
def test_a_link_in_the_place_of_lock_or_log_is_not_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    state = make(tmp_path / "state")
    (state / name).symlink_to(target)
    with pytest.raises(MachineError, match=name):
        if name == "vpnd.lock":
            statedir.lock(from_mapping({}, state))
        else:
            run(["--state-dir", str(state), "start", "--detach"])
    assert not target.exists()


def test_only_a_socket_is_removed_for_the_status_socket(tmp_path: Path) -> None:
    path = tmp_path / "vpnd.sock"
    path.write_text("precious")
    server = StatusServer(str(path), TIMEOUT_S, {})
    with pytest.raises(MachineError, match=r"status\.socket"):
        asyncio.run(server.start())
    assert path.read_text() == "precious"
