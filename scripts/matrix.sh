#!/bin/sh
# Runs the tests that need servers against newer ones than the system's, taken from newer Debian releases:
#   trixie: RabbitMQ 4.0, Redis 8, Valkey 8    sid: the newest RabbitMQ 4 and Valkey
#
#   sh scripts/matrix.sh PYTHON [SERVER...]      a server: trixie/rabbitmq trixie/redis trixie/valkey sid/rabbitmq ...
#
# Each release is unpacked once into a folder of its own (DRAY_MATRIX, outside of the tree: half a GB altogether) and its
# servers run in there with chroot; the system stays as it is. Needs root, debootstrap and a Debian mirror.
# MATRIX_PREPARE=only ends after the unpacking.
set -eu

python=$1
shift
[ $# -gt 0 ] || set -- trixie/rabbitmq sid/rabbitmq trixie/redis trixie/valkey sid/valkey
cache=${DRAY_MATRIX:-${XDG_CACHE_HOME:-$HOME/.cache}/dray-matrix}
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -m1 '/debian/*$' || true)}

if [ "$(id -u)" != 0 ]; then
    echo "chroot needs root: run this with sudo, or point DRAY_TEST_RABBITMQ_URL and DRAY_TEST_REDIS_URL at servers" >&2
    exit 1
fi

prepare() { # a release
    root=$cache/$1
    [ ! -e "$root/.complete" ] || return 0
    command -v debootstrap >/dev/null ||
        apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends debootstrap >/dev/null
    case $1 in
        trixie) packages=rabbitmq-server,redis-server,valkey-server ;;
        sid) packages=rabbitmq-server,valkey-server ;;
        *) echo "no packages are known for $1" >&2 && exit 1 ;;
    esac
    rm -rf "$root"
    mkdir -p "$cache"
    echo "unpacking $1 into $root"
    debootstrap --variant=minbase --include="$packages" "$1" "$root" "${mirror:-http://deb.debian.org/debian}" \
        >"$cache/$1.log" 2>&1 || { tail -20 "$cache/$1.log" >&2 && exit 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    cp /etc/hosts "$root/etc/hosts"
    touch "$root/.complete"
}

for server in "$@"; do
    prepare "${server%/*}"
done
[ "${MATRIX_PREPARE:-}" != only ] || exit 0

failed=
for server in "$@"; do
    root=$cache/${server%/*}
    echo "== $server"
    case ${server#*/} in
        rabbitmq)
            at=DRAY_TEST_RABBITMQ_ROOT=$root program=
            tests=$(ls tests/test_*rabbitmq*.py tests/test_*amqp*.py tests/test_*rpc*.py 2>/dev/null || true)
            ;;
        redis | valkey)
            at=DRAY_TEST_REDIS_ROOT=$root program=${server#*/}-server
            tests=$(ls tests/test_*redis*.py)
            ;;
        *) echo "what is ${server#*/}?" >&2 && exit 1 ;;
    esac
    # shellcheck disable=SC2086 # a list
    env "$at" DRAY_TEST_REDIS_PROGRAM="$program" "$python" -m pytest -q -n "${PYTEST_WORKERS:-4}" \
        tests/test_servers.py $tests || failed="$failed $server"
done
[ -z "$failed" ] || { echo "failed against:$failed" >&2 && exit 1; }
