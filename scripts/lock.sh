#!/bin/sh
# Writes the lock files again from pyproject.toml. Needs uv. The files name no address, so they
# work with every package index that carries the same files.
set -eu
cd "$(dirname "$0")/.."
lock() { # lock OUT ARGUMENTS…
    out=$1
    shift
    uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
        --python-version 3.11 "$@" -o "$out"
}
lock requirements-dev.lock pyproject.toml --extra dev
lock requirements.lock pyproject.toml --constraint requirements-dev.lock
# Wants an older web3 than ours, and works with ours: locked and installed without what it asks for.
echo 'signinwithethereum>=5.0.2' | uv pip compile --quiet --no-deps --universal --generate-hashes --no-header \
    --no-annotate --no-emit-index-url --python-version 3.11 - -o tests/clients/siwe.lock
