#!/bin/sh
# The environment: .venv/ from the hash-locked requirements, and the chain tools of anvil/.
#   scripts/install.sh run    what `farebox` needs
#   scripts/install.sh test   that, and what the tests need
# A second run finds its stamps and does nothing. PYTHON=… chooses the interpreter; NODE=wheel
# takes Node.js from PyPI where the machine has none.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd)
kind=${1:-run}

say() { printf '%s\n' "farebox: $*" >&2; }
stop() { say "$*"; exit 1; }
stamp_of() { cat "$@" | cksum | tr -d ' '; }

good_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for python in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python3.14 python \
        "$HOME"/.pyenv/versions/3.1[1-9]*/bin/python; do
        path=$(command -v "$python" 2>/dev/null) || continue
        if good_python "$path"; then
            printf '%s\n' "$path"
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-project '>=3.11' 2>/dev/null && return
    fi
    stop "Python 3.11 or newer (with venv) is needed: install it, or name it: make PYTHON=/path/to/python3"
}

fill() { # fill FILE [--no-deps]: install exactly what is locked there; a wheel where there is one
    if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
        uv pip install --quiet --python .venv/bin/python ${2:-} --require-hashes -r "$1" 2>/dev/null && return
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${2:-} --require-hashes -r "$1"
}

# The project itself: a line in the import path and the command. Nothing has to be built.
link_project() {
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$root" > "$site/farebox.pth"
    cat > .venv/bin/farebox <<PROGRAM
#!/bin/sh
'''exec' "$root/.venv/bin/python" "\$0" "\$@"
' '''
import sys

from gateway.cli import main

sys.exit(main())
PROGRAM
    chmod +x .venv/bin/farebox
}

# Whether .venv works and was made here: a copied or moved one points to its old place.
whole_environment() {
    [ -x .venv/bin/python ] && good_python .venv/bin/python &&
        grep -q "$root/.venv" .venv/bin/activate 2>/dev/null
}

python_part() {
    stamp=.venv/.farebox
    have=$(cat "$stamp" 2>/dev/null || :)
    # An environment for the tests also runs farebox; it is never taken back to less.
    case $kind:$have in
        test:* | run:test*) set=test lock=requirements-dev.lock ;;
        run:*) set=run lock=requirements.lock ;;
        *) stop "usage: scripts/install.sh run|test" ;;
    esac
    # What only the tests' own clients need, and asks for older releases of what we use.
    alone=tests/clients/siwe.lock
    want="$set $(stamp_of "$lock" "$alone") $root"
    [ "$have" = "$want" ] && return
    if ! whole_environment; then
        python=$(find_python)
        say "making .venv with $("$python" -V)"
        "$python" -m venv --clear .venv
    fi
    say "installing $lock"
    fill "$lock"
    [ "$set" = run ] || fill "$alone" --no-deps
    link_project
    printf '%s\n' "$want" > "$stamp"
}

find_npm() {
    if command -v npm >/dev/null 2>&1 && node --version >/dev/null 2>&1; then
        command -v npm
    elif [ "${NODE:-}" = wheel ]; then
        [ -x .venv/bin/npm ] || fill scripts/node.lock
        PATH=$root/.venv/bin:$PATH
        printf '%s\n' "$root/.venv/bin/npm"
    else
        stop "Node.js 18 or newer is needed for the local chain: https://nodejs.org, or: make install NODE=wheel"
    fi
}

node_part() { # node_part FOLDER
    [ -f "$1/package-lock.json" ] || return 0
    want=$(stamp_of "$1/package-lock.json")
    [ "$(cat "$1/node_modules/.farebox" 2>/dev/null || :)" = "$want" ] && return
    npm=$(find_npm)
    say "installing the packages of $1/"
    (cd "$1" && PATH=$root/.venv/bin:$PATH "$npm" ci --no-audit --no-fund --loglevel=error >&2)
    printf '%s\n' "$want" > "$1/node_modules/.farebox"
}

python_part
node_part anvil
if [ "$kind" = test ]; then
    node_part tests/clients
    node_part tests/clients/bench
fi
