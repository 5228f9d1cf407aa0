"""cluster.yaml, and what of the code and the settings reaches other hosts."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.cluster import cluster
from actors.travel import check_places, travelling
from common.errors import UserError
from conf.load import load
from tests.cluster.lab import local_file
from tests.running import ROOT

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("config", [SHIPPED, local_file(SHIPPED, 2)], ids=["AWS", "own machines"])
def test_ray_takes_the_file(config: dict[str, Any], in_the_checkout: None) -> None:
    validate_config(prepare_config(config))


def test_every_folder_of_code_travels_and_no_other(in_the_checkout: None) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    packages = {path.split("/")[0] for path in tracked if path.endswith(".py") and "/" in path}
    mounts = SHIPPED["file_mounts"]
    folders = {mounts[path] for path in mounts if (ROOT / mounts[path]).is_dir()}
    assert folders == packages - {"tests", "benchmarks"}
    files = {mounts[path] for path in mounts if (ROOT / mounts[path]).is_file()}
    assert files == {"launch.py", "Makefile", "requirements.lock", "monitoring/grafana/ddpo_dashboard.json"}


def test_every_node_has_the_token_and_asks_for_it() -> None:
    assert SHIPPED["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        start = SHIPPED[f"{role}_start_ray_commands"][-1]
        assert 0 <= start.find("RAY_AUTH_MODE=token") < start.find("ray start")


def test_nothing_but_ssh_is_open_to_the_world() -> None:
    """Ray's own rules are ssh, and everything between the machines of the cluster; a file can only add to them."""
    assert "IpPermissions" not in SHIPPED["provider"]["security_group"]
    assert not any("SecurityGroupIds" in kind["node_config"] for kind in SHIPPED["available_node_types"].values())
    assert not any("0.0.0.0" in line for line in SHIPPED["head_start_ray_commands"])


def test_the_head_is_on_demand_and_spot_machines_start_at_none() -> None:
    kinds = dict(SHIPPED["available_node_types"])
    head = kinds.pop(SHIPPED["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert kinds
    for kind in kinds.values():
        assert kind["min_workers"] == 0
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_of_the_users_folder_only_the_modules_that_are_named_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").touch()
    (tmp_path / "package" / "deep").mkdir(parents=True)
    for name in ("notes", "family", "goal", "rank"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path)
    mine = ["rewards.a.path=my_rewards:Brightness", "rewards.b.path=package.deep.module:Reward"]
    env = travelling(load(["compressibility", *mine]))
    assert env["working_dir"] == str(ROOT)
    assert env["py_modules"] == [str(tmp_path / "my_rewards.py"), str(tmp_path / "package")]
    mine = ["model.family=family:Mine", "learner.objective=goal:Mine", "learner.advantage=rank:Mine"]
    env = travelling(load(["compressibility", *mine]))
    assert env["py_modules"] == [str(tmp_path / f"{name}.py") for name in ("family", "goal", "rank")]


def test_the_run_folders_do_not_travel(in_the_checkout: None) -> None:
    assert {"/runs", "/.venv", "/.git"} <= set(travelling(load(["compressibility"]))["excludes"])
    assert "/out/put" in travelling(load(["compressibility", "run.dir=out/put"]))["excludes"]


def test_a_path_that_other_hosts_cannot_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load(["compressibility", "model.path=model", "ray.address=auto"])
    with pytest.raises(UserError, match=r"model\.path=model lies in"), cluster(config):
        pass


def test_a_path_in_a_folder_that_does_not_travel_is_refused(in_the_checkout: None) -> None:
    config = load(["compressibility", "model.lora.init_from=tests/faults", "ray.address=auto"])
    with pytest.raises(UserError, match=rf"model\.lora\.init_from=tests/faults lies in {ROOT}/tests"):
        check_places(config)
    check_places(load(["compressibility", "ray.address=auto"]))  # Emoji World travels


def test_a_job_names_its_cluster_and_a_run_folder_that_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://a.zip"}}')
    config = load(["compressibility"])
    with pytest.raises(UserError, match=r"ray\.address=auto"), cluster(config):
        pass
    on_the_cluster = dataclasses.replace(config, ray=dataclasses.replace(config.ray, address="auto"))
    with pytest.raises(UserError, match=r"run\.dir=runs lies in the job's copy"), cluster(on_the_cluster):
        pass
