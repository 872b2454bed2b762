#!/bin/sh
# Installs the servers that the tests start for themselves, where they are missing: as root, from Debian or Ubuntu.
# Elsewhere it says what to install; the tests that need a missing server are then skipped (in CI: they fail).
# Nothing is started. Where DRAY_TEST_RABBITMQ_URL or DRAY_TEST_REDIS_URL name a server, that one is not installed.
set -eu

packages=
has() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/lib/rabbitmq/bin/$1" ] || [ -x "/usr/sbin/$1" ]; }
[ -n "${DRAY_TEST_RABBITMQ_URL:-}" ] || has rabbitmq-server || packages="$packages rabbitmq-server"
[ -n "${DRAY_TEST_REDIS_URL:-}" ] || has redis-server || has valkey-server || packages="$packages redis-server"
[ -n "$packages" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing servers, whose tests are skipped:$packages" >&2
    echo "Debian, Ubuntu: sudo sh scripts/install_servers.sh    macOS: brew install rabbitmq redis" >&2
    echo "or docker compose up -d --wait, and name them: see docs/development.md" >&2
    exit 0
fi

# A package starts its service once it is installed, unless this file says no: these are for private use only.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "installing$packages"
export DEBIAN_FRONTEND=noninteractive
install() {
    # shellcheck disable=SC2086 # a list
    apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends $packages </dev/null >"$log" 2>&1
}
log=$(mktemp)
install || { apt-get -o DPkg::Lock::Timeout=300 update -qq && install; } || {
    cat "$log" >&2
    exit 1
}
rm -f "$log"
