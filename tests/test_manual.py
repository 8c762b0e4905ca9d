"""What is made from the commands' declarations: the reference, the manual page, completion."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vpnd.cli import completion, main, manual
from vpnd.cli.app import app
from vpnd.cli.completion import Shell

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = manual.entries(app)


def test_the_reference_is_what_the_commands_say(capsys):
    assert main(["manual"]) == 0
    assert (ROOT / "docs" / "commands.md").read_text() == capsys.readouterr().out, (
        "vpnd manual > docs/commands.md"
    )


def test_the_manual_page_has_every_command_and_option():
    page = manual.man_page(ENTRIES)
    for entry in ENTRIES[1:]:
        assert f".SS {entry.usage}".replace("-", "\\-") in page
        for option in entry.options:
            assert option.names[0].replace("-", "\\-") in page
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Tutf8"], input=page, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""


def test_every_command_and_option_says_what_it_is_for():
    for entry in ENTRIES:
        assert entry.help, entry.path
        for option in entry.options:
            assert option.help, f"{entry.path} {option.names}"


def completed(line: str) -> set[str]:
    """What bash offers behind `line`."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _vpnd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    script = completion.script(Shell.BASH, ENTRIES) + program
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("vpnd ", {"start", "status", "authority"}, {"add"}),
        ("vpnd st", {"start", "stop", "status"}, {"ping"}),
        ("vpnd --state-dir /x au", {"authority"}, {"add"}),
        ("vpnd authority ", {"add", "list", "revoke", "--config"}, {"start"}),
        ("vpnd authority add --s", {"--state-dir"}, {"--stolen"}),
        ("vpnd start --shards 4 --d", {"--detach"}, {"--shards"}),
        ("vpnd start --config pypr", {"pyproject.toml"}, {"--detach"}),
    ],
)
def test_bash_completes(line, offered, not_offered):
    words = completed(line)
    assert offered <= words and not not_offered & words


@pytest.mark.parametrize("shell", list(Shell))
def test_the_script_is_good_to_its_shell(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(completion.script(shell, ENTRIES))
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_completes(tmp_path):
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    script = tmp_path / "script"
    script.write_text(completion.script(Shell.FISH, ENTRIES))
    program = f"source {script}; complete -C 'vpnd authority '"
    done = subprocess.run(["fish", "-c", program], capture_output=True, text=True, check=True)
    assert re.findall(r"^\w+", done.stdout, re.M) == ["add", "list", "revoke"]
