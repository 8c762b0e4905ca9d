#!/bin/sh
# What test_booted.py runs as the last unit of a boot: $1 is the vpnd of the clone, /first.deb and /second.deb are packages.
# What it says is in /trial.log, and "ok" in /trial.result when all was as it should be; then the machine is off.
exec >/trial.log 2>&1
clone=$1
step() { echo "== $*"; }
must() {
    "$@" && return
    echo "error: $*"
    systemctl status vpnd --no-pager --lines=0
    journalctl -u vpnd --no-pager -n 60
    exit 1
}
must_not() { ! "$@" || must false "$@"; }
within_s() {
    left=$(($1 * 5))
    shift
    until "$@"; do
        [ $left -gt 0 ] || return 1
        left=$((left - 1))
        sleep 0.2
    done
}
show() { systemctl show -P "$1" vpnd; }
is() { [ "$(show "$1")" = "$2" ]; }
started_again() { is NRestarts "$1" && is ActiveState active; }
trap 'systemctl poweroff --no-block' EXIT

step "a unit of the clone: ready when systemctl returns"
vpnd() { "$clone" -P -m vpnd "$@"; }
must vpnd service install --now
must is ActiveState active
must is Type notify
must is StatusText "healthy: no peers"
must vpnd status
must ip address show vpnd0

step "reload, and one that is refused"
must systemctl reload vpnd
echo 'nonsense = 1' >/var/lib/vpnd/vpnd.toml
must_not systemctl reload vpnd
must vpnd status
rm /var/lib/vpnd/vpnd.toml

step "priorities in the journal"
kill -9 "$(vpnd status --json | sed -n '/"shards": \[/,$s/.*"pid": \([0-9]*\).*/\1/p' | head -1)"
must within_s 20 sh -c 'journalctl -u vpnd -p warning --no-pager -q | grep -q "shard 0"'
must_not sh -c 'journalctl -u vpnd -p warning --no-pager -q | grep -q "is ready"'
must sh -c "'$clone' -P -m vpnd logs -n 200 | grep -q 'is ready'"

step "a supervisor that hangs: the watchdog"
pid=$(show MainPID)
kill -STOP "$pid"
must within_s 60 started_again 1
must_not is MainPID "$pid"
must vpnd status

step "one that is killed"
kill -9 "$(show MainPID)"
must within_s 30 started_again 2
must vpnd status

step "stop, and nothing is left"
nothing_left() {
    ! ip link show vpnd0 2>/dev/null && ! nft list tables | grep vpnd &&
        ! ip rule show | grep -v -e 'lookup local' -e 'lookup main' -e 'lookup default'
}
must systemctl stop vpnd
must is Result success
must nothing_left
must_not sh -c 'journalctl -u vpnd --no-pager -q --since -20s | grep "signal 15"'

step "killed and not started again, and nothing is left"
must systemctl start vpnd
systemctl kill --kill-whom=main --signal=KILL vpnd
must systemctl stop vpnd
must within_s 10 nothing_left
must vpnd service uninstall
must test ! -e /etc/systemd/system/vpnd.service
rm -rf /var/lib/vpnd

step "the package: installed, it runs when told to"
vpnd() { /usr/bin/vpnd "$@"; }
must dpkg -i /first.deb
must_not systemctl -q is-active vpnd
must systemctl enable --now vpnd
must is StatusText "healthy: no peers"
id=$(vpnd id)
network=$(vpnd status --json | grep '"network_id"')
pid=$(show MainPID)

step "the next version: the service goes on with it, and is who it was"
must dpkg -i /second.deb
must is ActiveState active
must_not is MainPID "$pid"
must test "$(vpnd id)" = "$id"
must test "$(vpnd status --json | grep '"network_id"')" = "$network"

step "removed, and purged"
must dpkg --remove vpnd
must_not ip link show vpnd0
must test -e /var/lib/vpnd/identity.pem
must dpkg --purge vpnd
must test ! -e /var/lib/vpnd
must_not systemctl cat vpnd
echo ok >/trial.result
