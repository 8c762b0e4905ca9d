"""From flags, environment, file and defaults to one `Config`; or one `ConfigError` with every problem.

Precedence: flags, then VPND_<TABLE>_<KEY>, then the TOML file, then the defaults of `schema`. Every layer is
judged, also where a higher one replaces it. Nothing on the machine is touched but the file being read.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from vpnd import trust
from vpnd.config import fields, paths, values
from vpnd.config.check import check, check_identity, default_virtual_ip
from vpnd.config.fields import PEERS, Field
from vpnd.config.schema import Config, Peer
from vpnd.errors import ConfigError, PrivilegeError
from vpnd.printable import printable

#: How close a word must be to be offered as what was meant; difflib's own default.
_CLOSE = 0.6
#: An unknown VPND_ variable this close to a setting's is taken for a slip of the pen.
_CLOSE_VARIABLE = 0.85
#: Values longer than this are cut in messages.
_SHOWN = 100

DEFAULT = "default"
#: Flags of the command line that set something of the file.
FLAGS = {"worker.shards": "--shards", "network.interface": "--interface", "log.level": "--log-level"}
_PLACE_VARIABLES = {"VPND_CONFIG", "VPND_STATE_DIR"}


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration and the origin of each value: setting's path -> "default", file, variable or flag."""

    config: Config
    origins: dict[str, str]
    places: paths.Places


def load(
    config_file: Path | None,
    state_dir: Path | None,
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
) -> Config:
    """The configuration; `overrides` are flags by path ("worker.shards"), None for those not given.

    Raises ConfigError with one line per problem, PrivilegeError when the file may not be read.
    """
    return load_with_origins(config_file, state_dir, overrides, environ).config


def load_with_origins(
    config_file: Path | None,
    state_dir: Path | None,
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    only: Iterable[str] = (),
) -> Loaded:
    """As `load`, and tells where each value came from.

    `only`: the tables the caller uses. Problems in others are passed over (their settings keep the
    defaults), and so is a file that VPND_CONFIG names and that is yet to be written: a peer id can be asked
    for before the configuration that needs it is complete.
    """
    where = paths.places(config_file, state_dir, environ)
    is_default = paths.absolute(where.config_file) == where.state_dir / paths.CONFIG_FILE_NAME
    may_miss = where.named == "" or (where.named == "VPND_CONFIG" and (is_default or bool(only)))
    trust.check(where.state_dir, "state directory")
    content = _read(where, may_miss)
    reader = _Reader(where, frozenset(only))
    reader.take_mapping(str(where.config_file), content)
    reader.take_environment(environ)
    reader.take_overrides(overrides)
    return reader.finish()


def from_mapping(
    mapping: Mapping[str, object],
    state_dir: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """As `load`, from tables in memory, written as TOML would give them, instead of a file."""
    reader = _Reader(paths.places(None, state_dir, environ or {}), frozenset())
    reader.take_mapping("configuration", mapping)
    reader.take_environment(environ or {})
    reader.take_overrides(overrides or {})
    return reader.finish().config


def complete(
    config: Config,
    peer_id: str,
    host_name: str,
    origins: Mapping[str, str] | None = None,
    *,
    in_network: bool = False,
) -> Config:
    """`config` with virtual_ip and node name filled in and judged with the identity known.

    `in_network`: the node gets its address from a network, so none is filled in. `origins` (of `Loaded`) make the
    error name file and variable. Raises ConfigError.
    """
    network = config.network
    virtual_ip = network.virtual_ip or ("" if in_network else default_virtual_ip(peer_id))
    config = msgspec.structs.replace(
        config,
        node=msgspec.structs.replace(config.node, name=config.node.name or host_name),
        network=msgspec.structs.replace(network, virtual_ip=virtual_ip),
    )
    problems: list[str] = []
    check_identity(config, peer_id, _reporter(problems, origins or {}))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _read(where: paths.Places, may_miss: bool) -> Mapping[str, object]:
    file = where.config_file
    trust.check(paths.absolute(file), "configuration file")
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        if may_miss:
            return {}
        remedy = f"write it, make one with `vpnd config init`, or correct {where.named}"
        raise ConfigError(f"{file}: no such file; {remedy}") from None
    except PermissionError:
        raise PrivilegeError(f"{file}: may not be read by this user; run with sudo") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); name another file with --config"
        ) from None
    except UnicodeDecodeError as error:
        text = f"{file}: is not UTF-8 (byte {error.start}); save it as UTF-8"
        raise ConfigError(text) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}; correct it there") from None


def show_value(value: object) -> str:
    """A value on one line, as TOML or JSON write it, cut when long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def problem_line(origin: str, path: str, value: object, text: str) -> str:
    """One problem on one line: where it stands, the setting, its value, why not and what to do."""
    return printable(f"{origin}: {path} = {show_value(value)}: {text}")


def _reporter(problems: list[str], origins: Mapping[str, str]) -> Callable[[str, object, str], None]:
    def report(path: str, value: object, text: str) -> None:
        field = _field_of(path)
        if field and field.unit == "duration" and isinstance(value, float):
            value = values.format_duration(value)
        problems.append(problem_line(origins.get(path, "configuration"), path, value, text))

    return report


def _field_of(path: str) -> Field | None:
    table, _, key = path.partition(".")
    return fields.tables().get(table.partition("[")[0], {}).get(key)


def suggestion(word: str, known: Iterable[str], close: float = _CLOSE) -> str:
    """The known word nearest to `word`, or ""."""
    import difflib  # which a daemon seldom needs

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=close)), "")


class _Reader:
    """Takes the layers, lowest first; `finish` gives the configuration or raises all that was wrong."""

    def __init__(self, where: paths.Places, only: frozenset[str]) -> None:
        self._where = where
        self._only = only
        self._problems: list[str] = []
        self._refused: set[str] = set()
        self._values: dict[str, object] = {}
        self._peers: tuple[Peer, ...] = ()
        self._origins = {field.path: DEFAULT for field in fields.all_settings()}

    def _problem(self, origin: str, path: str, value: object, text: str, *, shown: str = "") -> None:
        table = path.partition(".")[0].partition("[")[0]
        self._refused.add(path)
        if not self._only or table in self._only:
            self._problems.append(problem_line(origin, shown or path, value, text))

    def _set(self, field: Field, raw: object, origin: str, text_form: bool = False) -> None:
        try:
            self._values[field.path] = values.convert(field, raw, text_form=text_form)
        except values.Refused as refusal:
            self._problem(origin, field.path, raw, str(refusal))
        self._origins[field.path] = origin

    def take_mapping(self, origin: str, content: Mapping[str, object]) -> None:
        """The tables of a file."""
        for table, keys in content.items():
            known = fields.tables().get(table)
            if known is None:
                self._problem(origin, table, keys, self._unknown_table(table))
            elif table == PEERS:
                self._take_peers(origin, keys)
            elif not isinstance(keys, Mapping):
                self._problem(origin, table, keys, f"must be a table; write [{table}] and its keys below")
            else:
                for key, raw in keys.items():
                    if key in known:
                        self._set(known[key], raw, origin)
                    else:
                        self._problem(origin, f"{table}.{key}", raw, _unknown_key(table, key))

    def _take_peers(self, origin: str, entries: object) -> None:
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
            self._problem(origin, PEERS, entries, "must be tables; write [[peers]] above each peer's keys")
            return
        self._peers = tuple(self._take_peer(origin, place, entry) for place, entry in enumerate(entries))

    def _take_peer(self, origin: str, place: int, entry: Mapping[str, object]) -> Peer:
        # what is refused or missing stays empty, which the checks across settings pass over
        taken: dict[str, object] = {"name": "", "peer_id": "", "virtual_ip": ""}
        known = fields.tables()[PEERS]
        for key, raw in entry.items():
            path = f"{PEERS}[{place}].{key}"
            self._origins[path] = origin
            if key not in known:
                self._problem(origin, path, raw, _unknown_key(PEERS, key))
                continue
            try:
                taken[key] = values.convert(known[key], raw, text_form=False)
            except values.Refused as refusal:
                self._problem(origin, path, raw, str(refusal))
        for key, field in known.items():
            if field.required and key not in entry:
                text = f'is missing; add {key} = "…" to this [[peers]] entry: {field.meaning}'
                self._problem(origin, f"{PEERS}[{place}].{key}", "", text)
        return Peer(**taken)  # type: ignore[arg-type]  # converted field by field

    def take_environment(self, environ: Mapping[str, str]) -> None:
        """VPND_<TABLE>_<KEY>. Other VPND_ variables pass, unless they look like a misspelt one."""
        known = {field.variable: field for field in fields.all_settings()}
        prefixes = tuple(f"VPND_{table}_".upper() for table in fields.tables())
        for variable, raw in environ.items():
            if variable in known:
                self._set(known[variable], raw, variable, text_form=True)
            elif variable.startswith("VPND_") and variable not in _PLACE_VARIABLES:
                meant = suggestion(variable, known, _CLOSE_VARIABLE)
                if meant or variable.startswith(prefixes):
                    meant = meant or suggestion(variable, known)
                    remedy = f"did you mean {meant}?" if meant else "unset it; peers are set in the file"
                    path = known[meant].path if meant else "environment"
                    text = f"there is no such variable; {remedy}"
                    self._problem("environment", path, raw, text, shown=variable)

    def take_overrides(self, overrides: Mapping[str, object]) -> None:
        """Flags by the path of their setting; None is a flag that was not given."""
        known = {field.path: field for field in fields.all_settings()}
        for path, raw in overrides.items():
            if raw is None:
                continue
            origin = FLAGS.get(path, "argument")
            if path in known:
                self._set(known[path], raw, origin)
            else:
                self._problem(origin, path, raw, _unknown_key(*path.partition(".")[::2]))

    def finish(self) -> Loaded:
        """The whole, after the checks across settings. Raises ConfigError."""
        tables: dict[str, object] = {PEERS: self._peers}
        for table, known in fields.tables().items():
            if table != PEERS:
                given = {key: self._values[f.path] for key, f in known.items() if f.path in self._values}
                tables[table] = fields.struct_of(table)(**given)
        config = Config(state_dir=str(self._where.state_dir), **tables)  # type: ignore[arg-type]
        across: list[str] = []
        report = _reporter(across, self._origins)
        refused = frozenset(self._refused)

        def unless_refused(path: str, value: object, text: str) -> None:
            if path not in refused and (not self._only or path.partition(".")[0] in self._only):
                report(path, value, text)

        check(config, unless_refused, network_known=not any(path.startswith("network.") for path in refused))
        problems = self._problems + across
        if problems:
            raise ConfigError("\n".join(problems))
        return Loaded(config=config, origins=self._origins, places=self._where)

    def _unknown_table(self, table: str) -> str:
        if table == "state_dir":
            return "is not set in the file; give --state-dir or VPND_STATE_DIR"
        owners = [name for name, keys in fields.tables().items() if table in keys and name != PEERS]
        if owners:
            return f"stands outside a table; write it below [{owners[0]}]"
        meant = suggestion(table, fields.tables())
        known = ", ".join(fields.tables())
        return (
            f"there is no such table; did you mean {meant}?"
            if meant
            else f"there is no such table; there are {known}"
        )


def _unknown_key(table: str, key: str) -> str:
    known = fields.tables().get(table, {})
    meant = suggestion(key, known)
    if meant:
        return f"there is no such key; did you mean {meant}?"
    owners = [f"{name}.{key}" for name, keys in fields.tables().items() if key in keys]
    if owners:
        return f"there is no such key; did you mean {owners[0]}?"
    return f"there is no such key; [{table}] has {', '.join(known)}" if known else "there is no such key"
