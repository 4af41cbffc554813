"""The scripts by which shells complete what `jaxpost` is called with.

A script is static: it holds all that can be completed, so a TAB starts no Python. A command is known by its path,
`plan sft` say. Behind a flag without choices stands the name of a file.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from jaxpost.flags import Flag


class Completed(NamedTuple):
    """A command as scripts know it.

    Attributes:
        about: what it does.
        subcommands: words that may follow it.
        flags: by path.
    """

    about: str
    subcommands: tuple[str, ...]
    flags: dict[str, list[Flag]]


Table = Mapping[str, Completed]

BASH = """\
# Completion of jaxpost for bash: jaxpost completion bash > ~/.local/share/bash-completion/completions/jaxpost
_jaxpost() {
    local word=${COMP_WORDS[COMP_CWORD]} path=${COMP_WORDS[1]} flag= near= several= flags= values= i
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "@commands@ --help" -- "$word"))
        return
    fi
    if [[ ${COMP_WORDS[2]} != -* ]]; then
        case $path in
@subcommands@
        esac
        if [[ -n $values ]]; then
            if ((COMP_CWORD == 2)); then
                COMPREPLY=($(compgen -W "$values" -- "$word"))
                return
            fi
            path="$path ${COMP_WORDS[2]}" values=
        fi
    fi
    # Bash takes --flag=value for three words.
    [[ $word == "=" ]] && word=
    for ((i = COMP_CWORD; i > 1; i--)); do
        if [[ $i -lt $COMP_CWORD && ${COMP_WORDS[i]} == --* ]]; then
            flag=${COMP_WORDS[i]}
            [[ $i -eq $((COMP_CWORD - 1)) || ${COMP_WORDS[i + 1]} == "=" ]] && near=1
            break
        fi
    done
@flags@
    case "$path $flag" in
@lists@
    esac
    if [[ -n $near$several ]]; then
        case "$path $flag" in
@values@
        esac
    fi
    if [[ $word != -* && -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [[ $word == -* || -z $near ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    fi
}
complete -o bashdefault -o default -F _jaxpost jaxpost"""

ZSH = """\
#compdef jaxpost
# Completion of jaxpost for zsh: jaxpost completion zsh > _jaxpost, in a folder of $fpath
_jaxpost() {
    local word=${words[CURRENT]} called=${words[2]} flag= near= several= values= i
    local -a flags commands
    if ((CURRENT == 2)); then
        commands=(@commands@)
        _describe command commands
        return
    fi
    if [[ ${words[3]} != -* ]]; then
        case $called in
@subcommands@
        esac
        if [[ -n $values ]]; then
            if ((CURRENT == 3)); then
                compadd -- ${=values}
                return
            fi
            called="$called ${words[3]}" values=
        fi
    fi
    if [[ $word == --*=* ]]; then
        flag=${word%%=*} near=1 word=${word#*=}
        compset -P '*='
    else
        for ((i = CURRENT - 1; i > 2; i--)); do
            if [[ ${words[i]} == --* ]]; then
                flag=${words[i]}
                ((i == CURRENT - 1)) && near=1
                break
            fi
        done
    fi
@flags@
    case "$called $flag" in
@lists@
    esac
    if [[ -n $near$several ]]; then
        case "$called $flag" in
@values@
        esac
    fi
    if [[ $word != -* && -n $values ]]; then
        compadd -- ${=values}
    elif [[ $word != -* && -n $near ]]; then
        _files
    else
        _describe -o flag flags
    fi
}
_jaxpost "$@\""""

FISH = """\
# Completion of jaxpost for fish: jaxpost completion fish > ~/.config/fish/completions/jaxpost.fish
function __jaxpost_at
    set -l words (commandline -opc)
    set -l path "$words[2]"
    if contains -- "$path" @parents@; and set -q words[3]; and not string match -q -- '-*' $words[3]
        set path "$path $words[3]"
    end
    contains -- "$path" $argv
end"""


def bash(table: Table) -> str:
    """For bash."""
    return _filled(
        BASH,
        commands=" ".join(table),
        subcommands=_arms(_subcommands(table), 8),
        flags=_flag_cases(table, "path", lambda flags: f'flags+=" {" ".join(f"--{flag.name}" for flag in flags)}"'),
        lists=_arms(_lists(table), 8),
        values=_arms(_values(table), 12),
    )


def zsh(table: Table) -> str:
    """For zsh, with what each flag means."""

    def described(flags: Iterable[Flag]) -> str:
        return f"flags+=({' '.join(shlex.quote(f'--{flag.name}:{flag.help}') for flag in flags)})"

    return _filled(
        ZSH,
        commands=" ".join(shlex.quote(f"{name}:{entry.about}") for name, entry in table.items()),
        subcommands=_arms(_subcommands(table), 8),
        flags=_flag_cases(table, "called", described),
        lists=_arms(_lists(table), 8),
        values=_arms(_values(table), 12),
    )


def fish(table: Table) -> str:
    """For fish, likewise."""
    parents = [name for name, entry in table.items() if entry.subcommands]
    lines = [_filled(FISH, parents=" ".join(parents)), "complete -c jaxpost -n '__jaxpost_at \"\"' -f"]
    for name, entry in table.items():
        lines.append(f"complete -c jaxpost -n '__jaxpost_at \"\"' -a {name} -d {shlex.quote(entry.about)}")
    for name in parents:
        words = shlex.quote(" ".join(table[name].subcommands))
        lines.append(f"complete -c jaxpost -n '__jaxpost_at {name}' -f -a {words}")
    for paths, flags in _shared(table).items():
        condition = shlex.quote("__jaxpost_at " + " ".join(f'"{path}"' for path in paths))
        for flag in flags:
            choices = f" -x -a {shlex.quote(' '.join(flag.choices))}" if flag.choices else ""
            takes = choices or (" -r" if flag.kind else "")
            text = flag.help.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"complete -c jaxpost -n {condition} -l {flag.name} -d '{text}'{takes}")
    return "\n".join(lines)


SHELLS: dict[str, Callable[[Table], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _filled(script: str, **parts: str) -> str:
    for name, text in parts.items():
        script = script.replace(f"@{name}@", text)
    return script


def _shared(table: Table) -> dict[tuple[str, ...], list[Flag]]:
    """Flags by the paths that have them, each flag once."""
    paths: dict[Flag, list[str]] = {}
    for entry in table.values():
        for path, flags in entry.flags.items():
            for flag in flags:
                paths.setdefault(flag._replace(default=None), []).append(path)
    shared: dict[tuple[str, ...], list[Flag]] = {}
    for flag, having in paths.items():
        shared.setdefault(tuple(having), []).append(flag)
    return shared


def _flag_cases(table: Table, variable: str, collected: Callable[[list[Flag]], str]) -> str:
    """Statements that collect the flags of a path."""
    return "\n".join(
        f"    case ${variable} in\n{_arms({tuple(map(shlex.quote, paths)): collected(flags)}, 8)}\n    esac"
        for paths, flags in _shared(table).items()
    )


def _subcommands(table: Table) -> dict[tuple[str, ...], str]:
    return {(name,): f'values="{" ".join(entry.subcommands)}"' for name, entry in table.items() if entry.subcommands}


def _values(table: Table) -> dict[tuple[str, ...], str]:
    """Patterns of a path and a flag: its choices."""
    return {_patterns(paths, flag): f'values="{" ".join(flag.values)}"' for paths, flag in _counted(table)}


def _lists(table: Table) -> dict[tuple[str, ...], str]:
    """Patterns of a path and a flag that takes several of its choices."""
    return {_patterns(paths, flag): "several=1" for paths, flag in _counted(table) if flag.is_list}


def _counted(table: Table) -> list[tuple[tuple[str, ...], Flag]]:
    """Paths and flags, of those whose values can be counted."""
    return [(paths, flag) for paths, flags in _shared(table).items() for flag in flags if flag.values]


def _patterns(paths: tuple[str, ...], flag: Flag) -> tuple[str, ...]:
    return tuple(f'"{path} --{flag.name}"' for path in paths)


def _arms(arms: Mapping[tuple[str, ...], str], indent: int) -> str:
    """Of a `case`."""
    return "\n".join(f"{' ' * indent}{'|'.join(patterns)}) {statement} ;;" for patterns, statement in arms.items())
