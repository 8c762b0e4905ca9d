"""A bug report has what is needed, and nothing that lets somebody else be this node or join its network."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vpnd.cli import bugreport, main
from vpnd.config import paths
from vpnd.identity import load_or_create
from vpnd.membership import token

PAGE = "page-token-0123456789"
RPC = "https://rpc.example.org/v3/0123456789abcdef"


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    load_or_create(tmp_path / "identity.pem")
    network = tmp_path / "network"
    network.mkdir()
    (network / "authority.key").write_bytes(bytes(range(64)))
    (tmp_path / paths.PAGE_TOKEN_NAME).write_text(f"{PAGE}\n")
    (tmp_path / "vpnd.toml").write_text(f'[registry]\nrpc_url = "{RPC}"\n[node]\nname = "nas"\n')
    return tmp_path


def keys(state_dir: Path) -> list[str]:
    pem = (state_dir / "identity.pem").read_text().splitlines()[1:-1]
    return [*pem, bytes(range(64)).hex(), PAGE, RPC.rpartition("/")[2]]


def test_it_has_what_is_needed_and_no_secret(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invitation = token.encode(
        token.Token(
            network=bytes(token.HINT_BYTES),
            peer_id=load_or_create(state_dir / "identity.pem").peer_id,
            addresses=("/ip4/192.0.2.1/tcp/4001",),
            secret=bytes(range(16)),
        )
    )
    log = f"2026 info supervisor: ready\nsomebody typed {invitation}\n{(state_dir / 'identity.pem').read_text()}"
    (state_dir / "vpnd.log").write_text(log)
    file = state_dir / "report.txt"
    assert main(["bugreport", "--state-dir", str(state_dir), "-w", str(file)]) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "read it" in capsys.readouterr().out
    text = file.read_text()
    for section in ("version", "doctor", "status", "configuration", "log", "ip address", "nft list ruleset"):
        assert f"==== {section}\n" in text
    assert (
        "not there: no daemon answers" in text and "2026 info supervisor: ready" in text and '"nas"' in text
    )
    assert not [secret for secret in (*keys(state_dir), invitation, "PRIVATE KEY") if secret in text]
    assert main(["bugreport", "--state-dir", str(state_dir), "-w", str(file)]) == 2, "nothing is overwritten"


@pytest.mark.parametrize("form", [0, -3, -2])
def test_rather_than_telling_a_key_there_is_no_report(
    state_dir: Path, form: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (state_dir / "vpnd.log").write_text(f"somehow: {keys(state_dir)[form]}\n")
    file = state_dir / "report.txt"
    assert main(["bugreport", "--state-dir", str(state_dir), "-w", str(file)]) == 1
    assert not file.exists() and "would be in the report" in capsys.readouterr().err


def test_of_a_long_log_the_end_is_told(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state_dir / "vpnd.log").write_text("first\n" + "x" * bugreport.LOG_BYTES + "\nlast\n")
    assert main(["bugreport", "--state-dir", str(state_dir), "-w", "-"]) == 0
    text = capsys.readouterr().out
    assert "last\n" in text and "first\n" not in text
