"""The state directory: one daemon in it, and a part of it that belongs to an unprivileged user."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import msgspec
import pytest

from supervisor import statedir
from vpnd.config.schema import Config, Process
from vpnd.errors import AlreadyRunningError, MachineError, PrivilegeError


def config(path: Path, user: str = "nobody") -> Config:
    return Config(state_dir=str(path), process=Process(user=user))


def test_one_daemon_has_the_directory(tmp_path: Path):
    fd = statedir.lock(config(tmp_path / "state"))
    with pytest.raises(AlreadyRunningError, match="vpnd stop"):
        statedir.lock(config(tmp_path / "state"))
    os.close(fd)
    os.close(statedir.lock(config(tmp_path / "state")))


@pytest.mark.root
def test_the_networks_directory_is_the_unprivileged_users_and_root_looks_in_without_rights(tmp_path: Path):
    path = tmp_path / "network"
    nobody = pwd.getpwnam("nobody")
    path.mkdir(0o700)  # as earlier versions left it
    os.chown(path, nobody.pw_uid, nobody.pw_gid)
    for _ in range(2):
        os.close(statedir.open_network(config(tmp_path)))
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (nobody.pw_uid, 0, 0o750)


@pytest.mark.setting("process.user")
@pytest.mark.root
def test_another_user_gets_the_files_of_the_one_before_and_no_others(tmp_path: Path):
    os.close(statedir.open_network(config(tmp_path)))
    path, nobody, daemon = tmp_path / "network", pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("daemon").pw_uid
    (tmp_path / "secret").write_text("root's")
    for name in ("ours", "linked twice", "roots"):
        (path / name).write_text("")
        os.chown(path / name, nobody, -1)
    os.link(path / "linked twice", path / "again")
    os.chown(path / "roots", 0, 0)
    os.symlink(tmp_path / "secret", path / "pointer")
    os.close(statedir.open_network(config(tmp_path, "daemon")))
    owners = {each.name: each.lstat().st_uid for each in path.iterdir()}
    assert owners["ours"] == daemon == path.stat().st_uid
    assert owners["linked twice"] == owners["again"] == nobody
    assert owners["roots"] == 0 == (tmp_path / "secret").stat().st_uid


@pytest.mark.root
def test_what_is_no_directory_of_its_own_is_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "network").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="network"):
        statedir.open_network(config(tmp_path))
    (tmp_path / "network").unlink()
    (tmp_path / "network").write_text("")
    with pytest.raises(MachineError, match="network"):
        statedir.open_network(config(tmp_path))
    missing = msgspec.structs.replace(config(tmp_path), process=Process(user="nobody-of-that-name"))
    with pytest.raises(PrivilegeError, match=r"process\.user"):
        statedir.open_network(missing)


@pytest.mark.root
def test_what_is_put_under_a_files_name_meanwhile_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    os.close(statedir.open_network(config(tmp_path)))
    path, nobody = tmp_path / "network", pwd.getpwnam("nobody").pw_uid
    (tmp_path / "secret").write_text("root's")
    (path / "ours").write_text("")
    os.chown(path / "ours", nobody, -1)

    def swap(mode: int) -> bool:
        (path / "ours").unlink()
        os.link(tmp_path / "secret", path / "ours")
        return True

    monkeypatch.setattr(statedir.stat, "S_ISREG", swap)
    try:
        os.close(statedir.open_network(config(tmp_path, "daemon")))
    finally:
        monkeypatch.undo()
    assert (tmp_path / "secret").stat().st_uid == 0
