# What scripts/test, scripts/demo and scripts/bench need from the system. Sourced by them, not run.
# Understands Debian and its derivatives; elsewhere it says what is missing.

say() { printf '%s\n' "==> $*" >&2; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo --preserve-env=DEBIAN_FRONTEND "$@"
    else
        say "need root for: $*  (no sudo here)"
        return 1
    fi
}

have_postgres() {
    local bin
    for bin in "${PG_BINDIR:-}" /usr/lib/postgresql/*/bin; do
        if [ -x "$bin/postgres" ] && [ -x "$bin/initdb" ] && [ -x "$bin/pgbench" ] && [ -x "$bin/pg_receivewal" ]; then
            return 0
        fi
    done
    command -v postgres >/dev/null && command -v initdb >/dev/null && command -v pgbench >/dev/null \
        && command -v pg_receivewal >/dev/null
}

have_prometheus() { command -v prometheus >/dev/null && command -v promtool >/dev/null; }

have_systemd() { command -v systemd-analyze >/dev/null && { [ -x /lib/systemd/systemd ] || [ -x /usr/lib/systemd/systemd ]; }; }

have_compiler() { command -v cc >/dev/null; }

# install_packages WHY PACKAGE...: installs Debian packages without letting them start a service, now or at the next boot.
install_packages() {
    local why=$1 cluster=/etc/postgresql-common/createcluster.conf
    shift
    if ! command -v apt-get >/dev/null; then
        say "$why is missing, and this is not a Debian system: install what corresponds to $*"
        return 1
    fi
    say "$why is missing, installing: $*"
    # postgresql-common would make a server that nobody asked for.
    if [ ! -e "$cluster" ]; then
        as_root mkdir -p "$(dirname "$cluster")"
        echo 'create_main_cluster = false' | as_root tee "$cluster" >/dev/null
    fi
    (
        # Debian starts what it installs, unless this program says no.
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            trap 'as_root rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
            as_root chmod 755 "$policy"
        fi
        export DEBIAN_FRONTEND=noninteractive
        as_root apt-get update -qq
        as_root apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold \
            "$@" >/dev/null
    ) || return
    case " $* " in
        *" prometheus "*) if [ -d /run/systemd/system ]; then as_root systemctl disable --quiet prometheus; fi ;;
    esac
}

need_postgres() { have_postgres || install_packages "PostgreSQL (server and client programs)" postgresql-15 postgresql-client-15; }

need_prometheus() { have_prometheus || install_packages "Prometheus" prometheus; }

# Installed, not run: a test checks units with it, and starts one of its own.
need_systemd() { have_systemd || install_packages "systemd" systemd; }

need_npm() {
    if ! command -v npm >/dev/null || ! command -v node >/dev/null; then
        install_packages "npm" nodejs npm
    fi
}

need_pip() { python3 -m pip --version >/dev/null 2>&1 || install_packages "pip" python3 python3-pip; }

# Where scripts/postgres-versions puts what it gets. The tests look at the same place (testkit/src/programs.rs). Root's must be one
# that the account reaches which the servers run under.
postgres_versions_dir() {
    if [ -n "${POSTGRES_VERSIONS_DIR:-}" ]; then
        realpath -m "$POSTGRES_VERSIONS_DIR"
    elif [ "$(id -u)" -eq 0 ]; then
        echo /var/cache/safekeeper/postgres
    else
        echo "$HOME/.cache/safekeeper/postgres"
    fi
}

need_rust() {
    if ! command -v cargo >/dev/null; then
        # Installed by rustup, but not on the path of this shell.
        if [ -r "$HOME/.cargo/env" ]; then . "$HOME/.cargo/env"; fi
    fi
    if ! command -v cargo >/dev/null; then
        say "cargo is missing: install Rust (https://rustup.rs)"
        return 1
    fi
    have_compiler || install_packages "a linker" gcc libc6-dev
}
