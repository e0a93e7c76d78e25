"""Completion scripts: tables of verbs and flags with a few lines of shell that look into them.

They run nothing: starting Python on each TAB would take longer than typing. cyclopts writes such scripts, too, but
takes any word for a verb that is spelled like one (`palimpsest report audit` names a folder) and offers no files where
text may also be a hub id.
"""

import re
from collections.abc import Iterable

from palimpsest.cli.completion import Option, Place, names_of

BASH = """\
# Completion of palimpsest for bash; written by `palimpsest completion bash`.
_palimpsest() {
    local cur="${COMP_WORDS[COMP_CWORD]}" place="" flag="" takes=one files=yes argument_files=yes
    local offered="" following="" choices="" word i first=1 behind=0
    COMPREPLY=()
    [[ $cur == "=" ]] && cur=""
    if ((COMP_CWORD > 1)); then
        place="${COMP_WORDS[1]}" first=2
    fi
    if ((COMP_CWORD > 2)); then
        case "$place ${COMP_WORDS[2]}" in
            @SUBVERBS@) place="$place ${COMP_WORDS[2]}" first=3 ;;
        esac
    fi
    for ((i = COMP_CWORD - 1; i >= first; i--)); do
        word="${COMP_WORDS[i]}"
        if [[ $word == -[a-zA-Z-]* ]]; then
            flag="$word"
            break
        fi
        [[ $word == "=" ]] || behind=$((behind + 1))
    done
    case "$place" in
@PLACES@
        *) return ;;
    esac
    if [[ -n $flag ]]; then
        case "$place:$flag" in
@FLAGS@
        esac
        if [[ $takes == none || ($takes == one && $behind -gt 0) ]]; then
            flag=""
        fi
    fi
    if [[ -n $flag && $cur != -* ]]; then
        [[ -n $choices ]] && COMPREPLY=($(compgen -W "$choices" -- "$cur"))
    elif [[ $cur == -* ]]; then
        files=no
        COMPREPLY=($(compgen -W "$offered" -- "$cur"))
    else
        files="$argument_files"
        ((COMP_CWORD == first)) && COMPREPLY=($(compgen -W "$following" -- "$cur"))
    fi
    if [[ $files == no ]] && type compopt >/dev/null 2>&1; then
        compopt +o default 2>/dev/null
    fi
    return 0
}
complete -o default -F _palimpsest palimpsest
"""

ZSH = """\
#compdef palimpsest
# Completion of palimpsest for zsh; written by `palimpsest completion zsh`.
_palimpsest() {
    local place="" flag="" word takes=one files=yes argument_files=yes i first=2 behind=0
    local -a offered following choices
    if ((CURRENT > 2)); then
        place=$words[2] first=3
    fi
    if ((CURRENT > 3)); then
        case "$place $words[3]" in
            @SUBVERBS@) place="$place $words[3]" first=4 ;;
        esac
    fi
    for ((i = CURRENT - 1; i >= first; i--)); do
        word=$words[i]
        if [[ $word == -[a-zA-Z-]* ]]; then
            flag=${word%%=*}
            [[ $word == *=* ]] && ((behind += 1))
            break
        fi
        ((behind += 1))
    done
    if [[ $PREFIX == --*=* ]]; then
        flag=${PREFIX%%=*} behind=0
    fi
    case "$place" in
@PLACES@
        *) return 1 ;;
    esac
    if [[ -n $flag ]]; then
        case "$place:$flag" in
@FLAGS@
        esac
        if [[ $takes == none || ($takes == one && $behind -gt 0) ]]; then
            flag=""
        fi
    fi
    if [[ $PREFIX == -* && ( -z $flag || $PREFIX != *=* ) ]]; then
        _describe -o flag offered
        return
    fi
    [[ $PREFIX == *=* ]] && compset -P '*='
    if [[ -n $flag ]]; then
        (($#choices)) && compadd -a choices
    else
        files=$argument_files
        ((CURRENT == first)) && _describe verb following
    fi
    [[ $files == yes ]] && _files
    return 0
}
if [[ $funcstack[1] == _palimpsest ]]; then
    _palimpsest "$@"
else
    compdef _palimpsest palimpsest
fi
"""

FISH = """\
# Completion of palimpsest for fish; written by `palimpsest completion fish`.
function __palimpsest_words
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        echo -- $word
    end
end
function __palimpsest_at
    set -l words (__palimpsest_words)
    set -l place "$words[1]"
    if set -q words[2]; and contains -- "$words[1] $words[2]" @SUBVERBS@
        set place "$words[1] $words[2]"
    end
    test "$place" = "$argv[1]"
end
function __palimpsest_first
    set -l words (__palimpsest_words)
    set -l parts (string split -n ' ' -- "$argv[1]")
    __palimpsest_at "$argv[1]"; and test (count $words) -eq (count $parts)
end
complete -c palimpsest -e
@LINES@
"""


def script(shell: str, places: dict[str, Place]) -> str:
    """The whole script of a shell."""
    subverbs = [name for name in places if " " in name]
    if shell == "fish":
        lines = "\n".join(_fish(places))
        return FISH.replace("@SUBVERBS@", " ".join(map(_quoted, subverbs))).replace("@LINES@", lines)
    template, one = (BASH, _bash_place) if shell == "bash" else (ZSH, _zsh_place)
    return (
        template.replace("@SUBVERBS@", "|".join(map(_quoted, subverbs)))
        .replace("@PLACES@", "\n".join(one(name, place) for name, place in places.items()))
        .replace("@FLAGS@", "\n".join(_flags(places, listed=shell == "zsh")))
    )


def _quoted(text: str) -> str:
    """Text in single quotes, which no shell looks into."""
    return "'" + text.replace("'", "'\\''") + "'"


def _plain(words: Iterable[str]) -> list[str]:
    """Words that no shell would read as anything else: bash and fish look once more into what they complete."""
    return [word for word in words if re.fullmatch(r"[\w.:/+-]+", word)]


def _bash_place(name: str, place: Place) -> str:
    offered, following = " ".join(names_of(place.options)), " ".join(_plain(place.next))
    files = "yes" if place.files else "no"
    return (
        f"        {_quoted(name)})\n"
        f"            offered={_quoted(offered)}\n"
        f"            following={_quoted(following)} argument_files={files} ;;"
    )


def _zsh_place(name: str, place: Place) -> str:
    def described(pairs: Iterable[tuple[str, str]]) -> str:
        return " ".join(_quoted(f"{one}:{line}" if line else one) for one, line in pairs)

    offered = described((name, option.help) for option in place.options for name in option.names)
    files = "yes" if place.files else "no"
    return (
        f"        {_quoted(name)})\n"
        f"            offered=({offered})\n"
        f"            following=({described(place.next.items())}) argument_files={files} ;;"
    )


def _flags(places: dict[str, Place], *, listed: bool) -> list[str]:
    """One arm for all flags that take the same; what is not listed takes one value, which may be a path."""
    arms: dict[str, list[str]] = {}
    for name, place in places.items():
        for option in place.options:
            set_ = _takes(option, listed=listed)
            if set_:
                arms.setdefault(set_, []).extend(_quoted(f"{name}:{flag}") for flag in option.names)
    return [f"            {'|'.join(patterns)}) {set_} ;;" for set_, patterns in arms.items()]


def _takes(option: Option, *, listed: bool) -> str:
    parts = [] if option.takes == "one" else [f"takes={option.takes}"]
    if words := " ".join(_plain(option.choices)):
        parts.append(f"choices=({words})" if listed else f"choices={_quoted(words)}")
    if not option.files and option.takes != "none":
        parts.append("files=no")
    return " ".join(parts)


def _fish(places: dict[str, Place]) -> list[str]:
    lines = []
    for name, place in places.items():
        at = f"complete -c palimpsest -n {_fish_quoted(f'__palimpsest_at {_fish_quoted(name)}')}"
        first = f"complete -c palimpsest -n {_fish_quoted(f'__palimpsest_first {_fish_quoted(name)}')}"
        if not place.files:
            lines.append(f"{at} -f")
        for word in _plain(place.next):
            line = place.next[word]
            told = f" -d {_fish_quoted(line)}" if line else ""
            lines.append(f"{first} -a {_fish_quoted(word)}{told}")
        for option in place.options:
            lines += [f"{at} {_fish_option(flag, option)}" for flag in option.names]
    return lines


def _fish_option(flag: str, option: Option) -> str:
    name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
    takes = "" if option.takes == "none" else " -r -F" if option.files else " -x"
    words = " ".join(_plain(option.choices))
    choices = f" -a {_fish_quoted(words)}" if words else ""
    told = f" -d {_fish_quoted(option.help)}" if option.help else ""
    return name + takes + choices + told


def _fish_quoted(text: str) -> str:
    """Single quotes of fish know two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
