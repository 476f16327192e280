#!/bin/sh
# What systemd's Restart=always does: xenstored is started again whenever it ends. The first one is somebody else's child.
# With "console" what the drop-in in docs/xenstore-daemon.md does as well: xenconsoled is started anew once xenstored is there.
console() {
    for i in $(seq 100); do
        xenstore-exists /tool 2> /dev/null && break
        sleep 0.1
    done
    kill $(pidof xenconsoled)
    while pidof xenconsoled > /dev/null; do sleep 0.1; done
    "$(ls -d /usr/lib/xen-*/bin | head -1)/xenconsoled" --log=guest
}

while grep -qs '^State:.[^ZX]' "/proc/$(cat /run/xenstored.pid)/status"; do
    sleep 0.1
done
while :; do
    [ "$1" != console ] || console &
    /usr/sbin/xenstored --no-fork --pid-file /run/xenstored.pid
    sleep 0.1
done
