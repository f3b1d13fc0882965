"""cluster.yaml: what Ray says to it, and what we read in it."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from deployment.processes import COMMANDS, REPOSITORY, run

from raygraft.configuration import read_configuration

CLUSTER = REPOSITORY / "cluster.yaml"


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


def test_ray_refuses_devices_at_the_top() -> None:
    """The reason for `metadata`: Ray accepts no keys of ours beside its own."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    config["devices"] = config["metadata"]["raygraft"]["devices"]
    with pytest.raises(Exception, match="devices"):
        validate_config(prepare_config(config))


def test_every_device_is_pinned_to_a_node() -> None:
    devices = read_configuration(CLUSTER).devices
    nodes = [device.node for device in devices]
    assert len(set(nodes)) == len(nodes) == 3
    assert all(device.memory and device.threads for device in devices)


def test_start_commands_enable_authentication() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    assert "~/.ray/auth_token" in config["file_mounts"]
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token " in start


def test_node_labels_are_written_once(tmp_path: Path) -> None:
    """The set-up command for labels, in a home of its own, writes what Ray can read."""
    from ray._private.label_utils import parse_node_labels_from_yaml_file

    config = yaml.safe_load(CLUSTER.read_text())
    (command,) = [c for c in config["setup_commands"] if "raygraft-labels" in c]
    labels = tmp_path / "raygraft-labels.yaml"
    subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True)
    assert list(parse_node_labels_from_yaml_file(str(labels))) == ["host"]
    labels.write_text("board: attention\n")
    subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True)
    assert parse_node_labels_from_yaml_file(str(labels)) == {"board": "attention"}


@pytest.mark.process
def test_plan_reads_it(tiny_model: Path) -> None:
    done = run(
        COMMANDS / "raygraft", "plan", "--cluster", CLUSTER, "-m", tiny_model, "--json", timeout=60
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["asked"] is False
    assert [use["device"] for use in plan["devices"]] == ["head", "attention", "feed-forward"]
    assert {transfer["link"] for transfer in plan["transfers"]} == {"tcp"}
