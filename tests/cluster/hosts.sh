#!/usr/bin/env bash
# Hosts on one machine, for tests: each has its own network, processes, disk, /tmp, /dev/shm, home folder and sshd.
# Needs root, iproute2, openssh-server. Everything lies under $HOSTS_DIR.
#   hosts.sh up N PATH...  hosts 10.77.0.1 .. 10.77.0.N; each sees these PATHs, the rest of /tmp is its own
#   hosts.sh cut I         host I falls silent: its cable is pulled, its processes go on
#   hosts.sh mend I        the cable goes back in
#   hosts.sh kill I        host I loses power, and what lay on its disk, in /tmp and in shared memory
#   hosts.sh revive I      host I boots again, with an empty disk
#   hosts.sh down          the end of all hosts
# Enter a host by `ssh -i $HOSTS_DIR/key root@10.77.0.I`; its disk is $HOSTS_DIR/disk, its home $HOSTS_DIR/disk/home.
set -euo pipefail
dir=${HOSTS_DIR:?the folder for keys and disks}
bridge=ddpo-br0 net=10.77.0

boot() {  # a host lives as long as the first process of its namespaces, which is its sshd
  ip netns exec "ddpo-h$1" setsid unshare --pid --fork --kill-child --mount-proc --uts "$0" init "$1" \
    </dev/null >"$dir/boot$1.log" 2>&1 &
  echo $! >"$dir/host$1.pid"
  for _ in $(seq 6000); do
    if bash -c "exec 3<>/dev/tcp/$net.$1/22" 2>/dev/null; then return; fi
    sleep 0.1
  done
  cat "$dir/boot$1.log" >&2; exit 1
}

init() {  # inside the namespaces
  hostname "ddpo-h$1"
  mount -t tmpfs -o size=4g,mode=755 ddpo-disk "$dir/disk"
  mount -t tmpfs -o size=4g,mode=1777 ddpo-shm /dev/shm
  mkdir -p "$dir/disk/home"; touch "$dir/disk/home/.bashrc"
  awk -F: -v OFS=: -v home="$dir/disk/home" '$1 == "root" {$6 = home} {print}' /etc/passwd >"$dir/disk/passwd"
  mount --bind "$dir/disk/passwd" /etc/passwd
  mkdir -m 1777 "$dir/disk/tmp"
  while read -r path; do
    if [[ $path == /tmp/* ]]; then mkdir -p "$dir/disk$path"; mount --bind "$path" "$dir/disk$path"; fi
  done <"$dir/seen"
  mount --rbind "$dir/disk/tmp" /tmp
  exec "$(command -v sshd)" -D -e -f /dev/null -o ListenAddress="$net.$1" -o HostKey="$dir/host_key" \
    -o AuthorizedKeysFile="$dir/key.pub" -o StrictModes=no -o PidFile=none -o PermitRootLogin=prohibit-password
}

power_off() {  # the end of its first process, and the kernel ends what else ran in its namespaces
  if [ -f "$dir/host$1.pid" ]; then kill -KILL "$(cat "$dir/host$1.pid")" 2>/dev/null || true; fi
  for _ in $(seq 6000); do if [ -z "$(ip netns pids "ddpo-h$1" 2>/dev/null)" ]; then return; fi; sleep 0.1; done
  echo "host $1 does not end: $(ip netns pids "ddpo-h$1")" >&2; exit 1
}

case "${1:-}" in
up)
  n=${2:?how many hosts}; shift 2
  if ip link show "$bridge" >/dev/null 2>&1; then echo "hosts are up already: hosts.sh down first" >&2; exit 1; fi
  mkdir -p "$dir/disk" /run/sshd; chmod 700 "$dir"
  printf '%s\n' "$@" >"$dir/seen"
  for key in key host_key; do [ -f "$dir/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/$key"; done
  ip link add "$bridge" type bridge; ip addr add "$net.254/24" dev "$bridge"; ip link set "$bridge" up
  for i in $(seq "$n"); do
    ip netns add "ddpo-h$i"
    ip link add "ddpo-v$i" type veth peer name eth0 netns "ddpo-h$i"
    ip link set "ddpo-v$i" master "$bridge" up
    ip -n "ddpo-h$i" addr add "$net.$i/24" dev eth0; ip -n "ddpo-h$i" link set eth0 up; ip -n "ddpo-h$i" link set lo up
    ip -n "ddpo-h$i" route add default via "$net.254"  # by which Ray finds the host's own address; nothing answers
    boot "$i"
  done ;;
init) init "$2" ;;
cut) ip link set "ddpo-v${2:?which host}" down ;;
mend) ip link set "ddpo-v${2:?which host}" up ;;
kill) power_off "${2:?which host}" ;;
revive) boot "${2:?which host}" ;;
down)
  for host in $(ip netns list | awk '$1 ~ /^ddpo-h[0-9]+$/ {print $1}'); do
    power_off "${host#ddpo-h}"
    ip link del "ddpo-v${host#ddpo-h}" 2>/dev/null || true  # now, and not when the kernel has taken the namespace apart
    ip netns del "$host"
  done
  ip link del "$bridge" 2>/dev/null || true ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
