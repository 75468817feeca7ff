#!/bin/sh
# The first process of a host: host.sh NAME FOLDER, in new namespaces of every kind but of users.
# When the host is up it prints its process id as its parent's namespace counts it, and lives until its input ends. The
# kernel kills every process of the host with it.
set -eu
cd -P /proc/self # /proc is still the parent's
first=${PWD#/proc/}
cd /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$2/tmp" # launchers name their files by process ids, which are the same on every host
mount --bind "$2/hosts" /etc/hosts
hostname "$1"
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save # or what one connection lost would slow the next
ip link set lo up
echo "$first"
exec env --ignore-signal=CHLD cat >/dev/null # the kernel then buries the host's orphans
