"""What is made from the schema is right and up to date."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from vpnd import peerid
from vpnd.config import fields, load, reference, values
from vpnd.config.fields import PEERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PEER = {
    "name": "b",
    "peer_id": peerid.from_public_key(bytes(32)),
    "virtual_ip": "10.86.0.2",
    "addresses": ["/dns/a/tcp/1"],
}


def test_the_reference_is_that_of_this_schema():
    assert (DOCS / "configuration.md").read_text() == reference.reference(), (
        "docs/configuration.md is stale: vpnd config reference > docs/configuration.md"
    )


def test_every_setting_has_a_unit_a_meaning_and_numbers_have_limits():
    for keys in fields.tables().values():
        for field in keys.values():
            assert field.meaning
            assert field.unit
            assert field.base in (str, bool) or (field.least is not None and field.most is not None), (
                field.path
            )


def test_every_default_is_within_its_own_limits():
    written = {
        table: {
            key: tomllib.loads(f"x = {values.toml_value(field, field.default)}")["x"]
            for key, field in keys.items()
        }
        for table, keys in fields.tables().items()
        if table != PEERS
    }
    assert load.from_mapping(written) == load.from_mapping({})


def test_the_template_says_nothing_and_shows_the_defaults_of_what_people_set():
    text = reference.template()
    essential = {
        table: {key for key, field in keys.items() if field.essential}
        for table, keys in fields.tables().items()
        if table != PEERS
    }
    essential = {table: keys for table, keys in essential.items() if keys}
    assert tomllib.loads(text) == {table: {} for table in essential}
    before_peers, _, rest = text.partition("# One [[peers]]")
    shown = before_peers + rest.partition("\n\n")[2]
    shown = re.sub(r"^#(?=\w+ = )", "", shown, flags=re.MULTILINE)
    content = tomllib.loads(shown)
    assert {table: set(keys) for table, keys in content.items()} == essential
    assert load.from_mapping(content) == load.from_mapping({})


def test_a_shown_configuration_reads_back_as_itself():
    mapping = {
        "network": {"mtu": 1280, "routes": ["10.1.0.0/16"], "virtual_ip": "10.86.0.1"},
        "p2p": {"dial_timeout": "1.5s"},
        "worker": {"ring_bytes": "1MiB"},
        "node": {"name": 'quo"te\\ü'},
        "peers": [PEER],
    }
    config = load.from_mapping(mapping)
    assert load.from_mapping(tomllib.loads(reference.as_toml(config))) == config


def test_the_json_schema_knows_every_key_and_no_others():
    schema = reference.json_schema()
    for table, keys in fields.tables().items():
        part = schema["properties"][table]
        part = part["items"] if table == PEERS else part
        assert set(part["properties"]) == set(keys)
        assert part["additionalProperties"] is False
    assert re.fullmatch(schema["properties"]["p2p"]["properties"]["dial_timeout"]["pattern"], "1.5s")
    assert schema["properties"][PEERS]["items"]["required"] == ["name", "peer_id", "virtual_ip"]
