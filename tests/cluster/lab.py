"""A cluster on hosts of this machine: hosts.sh makes them, `ray up` starts Ray on them, by cluster.yaml turned into a
file for `provider: local`."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.running import ROOT, TIMEOUT_S

HOSTS_SH = ROOT / "tests" / "cluster" / "hosts.sh"
DIRECTORY = Path("/run/ddpo-hosts")  # short, for Ray's sockets, and not in /tmp, of which each host has its own
VENV = Path(sys.prefix)
HEAD = 1


def needs() -> str | None:
    """What this machine lacks, and how to get it; None if nothing."""
    packages = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
    missing = [package for program, package in packages.items() if shutil.which(program, path=_path()) is None]
    if missing:
        return f"apt-get install {' '.join(missing)}"
    return None if os.geteuid() == 0 else "run it as root: it makes network namespaces"


def address(host: int) -> str:
    return f"10.77.0.{host}"


def local_file(shipped: dict[str, Any], workers: int) -> dict[str, Any]:
    """cluster.yaml for these hosts. Its cloud, machines and packages are replaced; the rest is as shipped: what travels
    to which host, the token, how Ray is started."""
    cloud = {"available_node_types", "head_node_type", "setup_commands", "head_setup_commands", "provider", "auth"}
    ours = {key: value for key, value in shipped.items() if key not in cloud}
    ours["provider"] = {
        "type": "local",
        "head_ip": address(HEAD),
        "worker_ips": [address(HEAD + 1 + i) for i in range(workers)],
    }
    ours["auth"] = {"ssh_user": "root", "ssh_private_key": str(DIRECTORY / "key")}
    ours["max_workers"] = workers
    ours["setup_commands"] = [f"ln -sfn {VENV} ~/ddpo-ray/.venv", shipped["setup_commands"][-1]]
    for key, cpus in (("head_start_ray_commands", 2), ("worker_start_ray_commands", 1)):
        stop, start = ours[key]
        small = re.sub(r"--object-store-memory=\d+", "--object-store-memory=300000000", start)
        ours[key] = [stop, f"{small} --num-cpus={cpus}"]
    return ours


class Lab:
    """Three hosts, a head and two for samplers. A context manager: it ends all that it started."""

    workers = 2

    def __enter__(self) -> "Lab":
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        DIRECTORY.mkdir(parents=True)
        self.file = DIRECTORY / "cluster.yaml"
        shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        self.file.write_text(yaml.safe_dump(local_file(shipped, self.workers)))
        try:
            self.hosts("up", 1 + self.workers, ROOT, VENV.resolve())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.hosts("down")
        shutil.rmtree(DIRECTORY, ignore_errors=True)

    def hosts(self, *words: object) -> None:
        subprocess.run([HOSTS_SH, *map(str, words)], check=True, env=_environment())

    def ray(self, *words: str) -> None:
        """`ray up` and the like, as a user does from the checkout."""
        command = [str(VENV / "bin" / "ray"), words[0], "-y", *words[1:], str(self.file)]
        done = subprocess.run(command, cwd=ROOT, env=_environment(), text=True, capture_output=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    def ssh(self, host: int, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.ssh_command(host, command), text=True, capture_output=True, timeout=TIMEOUT_S)

    def ssh_command(self, host: int, command: str) -> list[str]:
        options = ["-q", "-i", str(DIRECTORY / "key"), "-o", "StrictHostKeyChecking=no"]
        options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        return ["ssh", *options, f"root@{address(host)}", command]

    def put(self, host: int, path: str, text: str) -> None:
        """Writes a file on a host's own disk."""
        command = self.ssh_command(host, f"mkdir -p $(dirname {path}) && cat > {path}")
        subprocess.run(command, input=text, text=True, check=True, timeout=TIMEOUT_S)

    def fetch(self, host: int, path: str, to: Path) -> None:
        """Copies a folder from a host's own disk."""
        to.mkdir(parents=True)
        tar = subprocess.run(
            self.ssh_command(host, f"tar c -C {path} ."), check=True, capture_output=True, timeout=TIMEOUT_S
        )
        subprocess.run(["tar", "x", "-C", str(to)], input=tar.stdout, check=True)

    def join(self, host: int) -> None:
        """Sets up a host whose disk is empty and starts Ray on it, by the file. The autoscaler of a local cluster
        brings back hosts that it has lost, but sets up none twice."""
        file = yaml.safe_load(self.file.read_text())
        rsync = ["rsync", "-a", "--exclude=__pycache__", "-e", " ".join(self.ssh_command(host, "")[:-2])]
        for target, source in file["file_mounts"].items():
            path = ROOT / Path(source).expanduser()
            made = self.ssh(host, f"mkdir -p $(dirname {target})")
            assert made.returncode == 0, made.stderr
            place = f"root@{address(host)}:{target.removeprefix('~/')}"
            subprocess.run([*rsync, f"{path}/" if path.is_dir() else str(path), place], check=True, timeout=TIMEOUT_S)
        setup = self.ssh(host, "; ".join(file["setup_commands"]))
        assert setup.returncode == 0, setup.stdout + setup.stderr
        start = f"export RAY_HEAD_IP={address(HEAD)}; {'; '.join(file['worker_start_ray_commands'])}"
        # The autoscaler may find the host at the same moment, and each begins with stopping what the other has started.
        wait_until(lambda: host in self.alive() or self.ssh(host, start).returncode == 0, f"Ray on host {host}")

    def alive(self) -> set[int]:
        """The hosts that the cluster has, by the head's word."""
        script = "import ray; ray.init('auto', log_to_driver=False, logging_level='error'); "
        script += "print(*[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"
        done = self.ssh(HEAD, f'RAY_AUTH_MODE=token ~/ddpo-ray/.venv/bin/python -c "{script}"')
        return {int(word.rpartition(".")[2]) for word in done.stdout.split()}


def wait_until(condition: Callable[[], bool], what: str) -> float:
    """How long it took, in seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < TIMEOUT_S, f"not within {TIMEOUT_S:.0f} s: {what}"
        time.sleep(1)
    return time.monotonic() - start


def _environment() -> dict[str, str]:
    """RAY_TMPDIR: Ray notes there which local hosts it has started; a lost host is not what it was. Version 2 of the
    autoscaler takes the head of a local cluster for one of its workers, and would start one too few."""
    own = {"HOSTS_DIR": str(DIRECTORY), "RAY_TMPDIR": str(DIRECTORY / "control"), "RAY_UP_enable_autoscaler_v2": "0"}
    return os.environ | own | {"PATH": _path()}


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


if __name__ == "__main__":
    sys.exit(needs())  # a sentence and code 1, or nothing and code 0
