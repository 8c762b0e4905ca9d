# Sourced by the other scripts: keeps .venv at the root of the tree equal to the lock files.
#
#   root=…; . "$root/scripts/venv.sh"
#   ensure_venv [dev]       afterwards $python is the interpreter of .venv, with the packages of requirements.lock
#                           (dev: and of requirements-dev.lock) and the tree itself on its path
#
# A script that wants another environment than .venv sets $venv before, and uses the functions below.
#
# A stamp in .venv holds the hash of the lock file it was made from, so nothing is done, and no network is
# needed, while it fits. Messages go to standard error; a failure ends the script with status 1.
# shellcheck shell=sh disable=SC2154

venv=${venv:-$root/.venv}
python=$venv/bin/python

say() { printf 'vpnd: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

lock_hash() { # of lock file $1 and of the place of the tree, which .venv remembers
    { cat -- "$root/$1"; printf '%s' "$root"; } | sha256sum | cut -d ' ' -f 1
}

stamped() { # is .venv what lock file $1 says?
    [ -x "$python" ] && [ -r "$venv/$1.stamp" ] && [ "$(cat -- "$venv/$1.stamp")" = "$(lock_hash "$1")" ]
}

# May every user run this interpreter? One below root's home cannot serve the unprivileged children.
for_everybody='import os, pathlib, sys
place = pathlib.Path(os.path.realpath(sys.executable))
sys.exit(not all(part.stat().st_mode & 1 for part in [place, *place.parents]))'

find_python() { # prints the first Python that is new enough and can make a .venv
    new_enough=
    second_best=
    for candidate in python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        new_enough=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
        if "$candidate" -c "$for_everybody" 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        second_best=${second_best:-$candidate}
    done
    if [ -n "$second_best" ]; then
        printf '%s\n' "$second_best"
        return
    fi
    if [ -n "$new_enough" ]; then
        version=$("$new_enough" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$new_enough cannot make virtual environments; install them: apt-get install python$version-venv"
    fi
    fail "Python 3.11 or newer is needed; install it: apt-get install python3 python3-venv"
}

counted() { # counted MOST: what pip says, as a count of at most so many packages; on a terminal one line, kept up to date
    terminal=0
    [ ! -t 2 ] || terminal=1
    awk -v most="$1" -v terminal="$terminal" '
        function show(text) {
            if (terminal) printf "\r\033[Kvpnd: %s", text >"/dev/stderr"
            else if (++shown % 20 == 0) printf "vpnd: %s\n", text >"/dev/stderr"
        }
        /^failed$/ { bad = 1 }
        /^Collecting / { show("package " ++count " of at most " most ": " $2) }
        /^Building wheels/ { show("building what has no wheel") }
        /^Installing collected/ { show("installing " count " packages") }
        END { if (terminal && count) printf "\r\033[K" >"/dev/stderr"; exit bad }'
}

install_lock() { # install_lock LOCKFILE: its packages into $venv, by hash
    # pip reads PIP_* and its own configuration, so a mirror or a proxy of the machine is used.
    # A few packages have no wheels: they are built, perhaps as root, with what requirements-build.lock names and nothing
    # else (--no-build-isolation; isolated, pip would fetch whatever setuptools is the newest, unchecked).
    # --use-pep517: old and new pip shall build them in the same way
    for wanted in requirements-build.lock "$1"; do
        { PYTHONUNBUFFERED=1 "$python" -m pip install --disable-pip-version-check --no-input --no-color --require-hashes \
            --no-build-isolation --use-pep517 --requirement "$root/$wanted" || echo failed; } |
            counted "$(grep -c '^[a-z]' "$root/$wanted")" || fail "the packages of $wanted could not be installed (see above)"
    done
    lock_hash "$1" >"$venv/$1.stamp"
}

make_venv() ( # a subshell, so that the lock is let go with it
    # The tree's own directory is the lock: nothing to leave behind, and a reader needs no write permission for it
    exec 9<"$root"
    flock 9
    stamped requirements.lock && exit 0 # somebody else has just done it
    [ -w "$root" ] || fail "$root is not writable: run once as its owner, or with sudo"
    umask 022 # the children of the daemon are another user and read it too
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        maker=$(find_python) || exit 1
        say "making .venv with $maker (once, about a minute)"
        "$maker" -m venv --clear "$venv" >&2 || fail "$maker could not make $venv"
    else
        say "bringing .venv up to requirements.lock"
    fi
    "$python" -c 'import sys, sysconfig, pathlib
pathlib.Path(sysconfig.get_path("purelib"), "vpnd.pth").write_text(sys.argv[1] + "\n")' "$root"
    install_lock requirements.lock
)

add_dev() (
    exec 9<"$root"
    flock 9
    stamped requirements-dev.lock && exit 0
    umask 022
    say "installing what the tests need"
    install_lock requirements-dev.lock
)

ensure_venv() {
    stamped requirements.lock || make_venv || exit 1
    [ "${1:-}" != dev ] || stamped requirements-dev.lock || add_dev || exit 1
}
