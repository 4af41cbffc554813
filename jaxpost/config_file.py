"""A `--config` file: flags in YAML. Its entries go through the parser of the command line, before those given there."""

import json
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.flags import flags_of, shown
from jaxpost.options import nearest, without_secrets

MOST_YAML = 1_000_000  # bytes
MOST_NESTED = 16


def annotated(config: Any, title: str) -> str:
    """A config as a file that `--config` reads back: in the order of `--help`, what was changed marked as such.

    Args:
        config: an instance of a config dataclass.
        title: of its command.
    """
    import yaml

    lines, group, values = [f"# jaxpost {title} --config THIS_FILE"], None, without_secrets(config)
    for flag in flags_of([type(config)]):
        if flag.name not in values:
            continue
        if flag.group is not group:
            group = flag.group
            lines += ["", f"# {group}"]
        value, style = values[flag.name], {"allow_unicode": True, "width": float("inf")}
        if isinstance(value, list | dict):
            text = f"{flag.name}: {yaml.safe_dump(value, default_flow_style=True, **style)}"
        else:
            text = yaml.safe_dump({flag.name: value}, **style)
        entry = text.rstrip("\n").split("\n")
        if value != flag.default:
            note = f"# default: {shown(flag.default)}"
            entry = [f"{entry[0]}  {note}"] if len(entry) == 1 else [note, *entry]
        lines += entry
    return "\n".join(lines)


def file_words(path: Path, known: set[str]) -> list[str]:
    """The entries of a YAML file as command-line words, so that both are converted by one parser.

    The scalars are taken as written: `1e-5` is not yet a string and `no` not yet a boolean.
    """
    import yaml

    try:
        if path.is_file() and path.stat().st_size > MOST_YAML:
            raise ConfigError(f"--config {path}: {path.stat().st_size / 1e6:.0f} MB; that is no file of flags")
        text = path.read_text(encoding="utf-8")
        _check_nesting(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        remedy = "; indent with spaces, not with tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())}){remedy}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {path}: expected a mapping of flags to values, such as learning_rate: 1e-5")
    flags: list[str] = []
    seen: set[str] = set()
    for key_node, value_node in root.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"--config {path}, line {line}: {key!r} is given twice")
        seen.add(key)
        if key not in known:
            raise ConfigError(
                f"--config {path}, line {line}: unknown key {key!r}{nearest(key, known)}; --help lists them"
            )
        values = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not all(isinstance(value, yaml.ScalarNode | yaml.MappingNode) for value in values):
            raise ConfigError(f"--config {path}, line {line}: {key!r} must be a value or a list of values")
        # `--key=value` keeps a leading minus sign from looking like a flag; argparse takes lists only apart.
        words = [_word(value) for value in values]
        flags += [f"--{key}={words[0]}"] if isinstance(value_node, yaml.ScalarNode) else [f"--{key}", *words]
    return flags


def _check_nesting(path: Path, text: str) -> None:
    """Refuse what would take a parser long, or grow when it is written out: deep nesting, and aliases."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED or isinstance(event, yaml.AliasEvent):
            what = "an alias" if isinstance(event, yaml.AliasEvent) else "nested too deeply"
            raise ConfigError(f"--config {path}, line {event.start_mark.line + 1}: {what}; write the values out")


def _word(node: Any) -> str:
    """A value of a YAML file as it would stand on the command line."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return json.dumps(yaml.SafeLoader("").construct_document(node), default=str)
    return "null" if node.tag == "tag:yaml.org,2002:null" else node.value
