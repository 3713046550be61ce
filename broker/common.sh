# shellcheck shell=bash
# What start and generate-certs.sh have in common: they read this, nobody runs it.

die() { # STATUS MESSAGE [HINT]
    printf '%s: error: %s\n' "${0##*/}" "$2" >&2
    [[ -z ${3-} ]] || printf 'hint: %s\n' "$3" >&2
    exit "$1"
}

show_help() {
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
}

others_can() { # DIGIT FILE: whether group or others may read (4) or write (2) it
    [[ -n $(find "$2" -prune \( -perm "-0${1}0" -o -perm "-00$1" \)) ]]
}

# Refuse a path that other users could lead elsewhere. Whoever runs this, above all root, would
# read what is theirs, and write where their links point. Who may write in a group of mine is not
# looked at above DIR: that group is often the user's own. What it could put in DIR's place would
# not be the user's, so that enter refuses it.
check_way() { # DIR, which need not exist
    local me mode owner name
    [[ $1 == /* ]] || set -- "$PWD/$1"
    command -v namei >/dev/null || die 1 "there is no program namei" "apt install util-linux"
    me=$(id -un 2>/dev/null) || me=$EUID
    while read -r mode owner _ name; do
        [[ $mode == [dl]????????? ]] || continue # not there yet, or no directory
        [[ ($owner == "$me" || $owner == root) && $mode != d???????w[!tT] ]] ||
            die 1 "$name, on the way to $1, belongs to another user, or others can write to it" \
                "use a directory below one of your own"
    done < <(namei -l -- "$1" || true)
}

# Go to a directory, if nobody else can change what is in it.
enter() { # DIR
    [[ $1 == /* ]] || set -- "$PWD/$1" # cd has a meaning of its own for "-", and for $CDPATH
    cd -- "$1" || die 1 "cannot use the directory $1"
    { [[ -O . ]] && ! others_can 2 .; } ||
        die 1 "the directory $1 is not your own, or others can write to it" \
            "chmod go-w $1, or use another directory"
}

# Refuse a file that somebody else may have chosen, or could change.
check_file() { # FILE NAME
    { [[ -f $1 && ! -L $1 && -O $1 ]] && ! others_can 2 "$1"; } ||
        die 1 "$2 is a link, not your own, or others can write to it" \
            "put a copy in its place that only you can write to"
}
