"""What the commands print when all is well."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli.command_line import Command

COMMANDS = ("run", "chat", "plan", "regions", "devices", "verify", "bench")
CUT = ("--device", "a:threads=1", "--device", "b:threads=1")
RULES = ("--place", "kind:attention=a", "--place", "kind:ffn=b")


def test_help_names_every_command(raygraft: Command) -> None:
    ended = raygraft("--help")
    assert ended.code == 0
    for name in COMMANDS:
        assert name in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(raygraft: Command, name: str) -> None:
    ended = raygraft(name, "-h")
    assert ended.code == 0
    assert "--json" in ended.out
    assert ended.err == ""


@pytest.mark.parametrize("name", ["run", "chat", "plan", "verify", "bench"])
def test_commands_that_have_a_cache_take_its_type(raygraft: Command, name: str) -> None:
    said = " ".join(raygraft(name, "-h").out.replace("│", " ").split())
    assert "--cache-type" in said
    assert "f32|f16|q8_0" in said
    assert "f32 takes 4 bytes, f16 2, q8_0 about 1" in said
    assert "[default: f32]" in said


def test_options_in_groups_keep_their_defaults_and_panels(raygraft: Command) -> None:
    said = {name: raygraft(name, "-h").out for name in ("run", "chat")}
    for name, tokens in (("run", 128), ("chat", 512)):
        lines = [line for line in said[name].splitlines() if "--n-predict" in line]
        assert len(lines) == 1
        assert f"[default: {tokens}]" in " ".join(said[name].split())
    for panel in ("Model", "Devices and placement", "Sampling"):
        assert all(f" {panel} " in text for text in said.values())


def test_version(raygraft: Command) -> None:
    ended = raygraft("--version")
    assert ended.code == 0
    assert ended.out.startswith("raygraft 0.")


@pytest.mark.process
def test_module_is_the_command(tiny_model: Path) -> None:
    """`python -m raygraft`, in a process of its own: as a Ray job calls it."""
    command = [sys.executable, "-m", "raygraft", "plan", "-m", str(tiny_model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == tiny_model.name


def test_regions_as_json(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("regions", "-m", tiny_model, "--json")
    assert (ended.code, ended.err) == (0, "")
    regions = {region["name"]: region for region in json.loads(ended.out)["regions"]}
    assert regions["model"]["parent"] is None
    assert regions["model"]["children"] == ["embed", "blk.0", "blk.1", "head", "sample"]
    attention = regions["blk.1.attn"]
    assert attention["kind"] == "attention"
    assert list(attention["inputs"].values()) == list(attention["outputs"].values()) == [64]
    assert "blk.1.attn_q.weight" in attention["weights"]
    assert regions["blk.1.attn.core"]["states"]


def test_regions_as_a_tree(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("regions", "-m", tiny_model)
    assert ended.code == 0
    assert "blk.0.attn.core core, 0 B, 64+32+32 → 64, owns a cache" in ended.out
    assert "blk.1 alike" in ended.out
    assert "matmul" not in ended.out
    assert "matmul(64x32" in raygraft("regions", "blk.0", "-m", tiny_model, "--operators").out


def test_plan_as_json_is_all_that_is_printed(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--json")
    assert (ended.code, ended.err) == (0, "")
    plan = json.loads(ended.out)
    assert plan["asked"] is False
    device_of = {placement["region"]: placement["device"] for placement in plan["placements"]}
    assert device_of["blk.0.attn.core"] == "a"
    assert device_of["blk.1.ffn.down"] == "b"
    assert {transfer["link"] for transfer in plan["transfers"]} == {"ring"}


def test_a_narrower_cache_takes_as_much_less(raygraft: Command, tiny_model: Path) -> None:
    taken = {}
    for kind in ("f32", "f16"):
        plan = json.loads(raygraft("plan", "-m", tiny_model, "--cache-type", kind, "--json").out)
        taken[kind] = sum(use["cache"] for use in plan["devices"])
        assert plan["limits"]["cache_type"] == kind
    assert taken["f32"] == 2 * taken["f16"] > 0


def test_plan_of_devices_on_other_nodes(raygraft: Command, tiny_model: Path) -> None:
    """A declared plan shows the links of the cluster, not of the machine that it is made on."""
    devices = ("--device", "a:node=host=box-a", "--device", "b:node=host=box-b")
    plan = json.loads(raygraft("plan", "-m", tiny_model, *devices, *RULES, "--json").out)
    assert {transfer["link"] for transfer in plan["transfers"]} == {"tcp"}
    assert [use["node"] for use in plan["devices"]] == ["host=box-a", "host=box-b"]


def test_plan_as_tables(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--reasons")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split() == ["device", "regions", "weights", "cache", "stages"]
    assert lines[1].startswith("a       blk.[0-1].attn")
    assert lines[2].startswith("b       embed, blk.[0-1].ffn, head, sample")
    assert lines[3].startswith("5 hops a token (ring), ")
    assert "The devices were not asked" in ended.out
    assert "rule 2 (kind:ffn=b)" in ended.out


def test_rules_of_the_command_line_come_after_those_of_the_file(
    raygraft: Command, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text("devices: [{name: a, threads: 1}, 'b:threads=1']\nplace: {model: a}\n")
    ended = raygraft("plan", "-m", tiny_model, "--devices", file, "--place", "head=b", "--json")
    plan = json.loads(ended.out)
    assert {p["region"] for p in plan["placements"] if p["device"] == "b"} == {"head"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_as_json(raygraft: Command, tiny_model: Path) -> None:
    arguments = ("-m", tiny_model, "-p", "the cat", "-n", 5, "--temp", 0, *CUT, *RULES)
    ended = raygraft("run", *arguments, "--cache-type", "f16", "--logprobs", 3, "--json")
    assert (ended.code, ended.err) == (0, "")
    answer = json.loads(ended.out)
    assert isinstance(answer["text"], str)
    assert all(isinstance(token, int) for token in answer["prompt_tokens"] + answer["tokens"])
    assert len(answer["tokens"]) == 5
    assert answer["finish_reason"] == "length"
    assert [len(best) for best in answer["logprobs"]] == [3] * 5
    timings = answer["timings"]
    assert timings["load_s"] > 0
    assert timings["prefill_tps"] > 0
    assert timings["decode_tps"] > 0
    assert timings["hops_per_token"] == len(answer["plan"]["transfers"]) == 5
    assert timings["bytes_per_hop"] > 0
    assert answer["plan"]["asked"] is True
    assert answer["plan"]["limits"]["cache_type"] == "f16"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_prints_the_answer_and_says_the_rest_beside(
    raygraft: Command, tiny_model: Path, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat")
    arguments = ("-m", tiny_model, "-f", prompt, "-n", 4, "--temp", 0, *CUT, *RULES)
    plain = raygraft("run", *arguments)
    assert plain.code == 0
    assert plain.out.startswith("the cat")
    assert "reading tiny.gguf" in plain.err
    assert "tokens/s" in plain.err
    shown = raygraft("run", *arguments, "--show-plan")
    assert shown.out.splitlines()[0].startswith("device")
    assert shown.out.endswith(plain.out)


SLOW = """
import time

from raygraft.kernels.compile_cache import compiling, found_or_missed
from raygraft.kernels.reference.backend import ReferenceBackend


class Slow(ReferenceBackend):
    def load(self, *arguments):
        with compiling():
            found_or_missed(lambda: None)
            time.sleep(4)
        return super().load(*arguments)
"""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_says_that_a_device_compiles(
    raygraft: Command, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    device = f"a:backend={tmp_path / 'slow.py'}:Slow"
    ended = raygraft("run", "-m", tiny_model, "-p", "the cat", "-n", 1, "--device", device)
    assert ended.code == 0
    assert ended.err.count("compiling kernels, once per machine") == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_devices(raygraft: Command) -> None:
    ended = raygraft("devices", *CUT, "--json")
    assert (ended.code, ended.err) == (0, "")
    devices = json.loads(ended.out)["devices"]
    assert [device["name"] for device in devices] == ["a", "b"]
    assert all(device["type"] == "cpu" and device["threads"] == 1 for device in devices)
    assert all(device["memory_total"] > device["memory_free"] > 0 for device in devices)
    table = raygraft("devices", *CUT).out.splitlines()
    assert table[0].split()[:4] == ["device", "node", "backend", "type"]
    assert [line.split()[0] for line in table[1:] if not line.startswith(" ")] == ["a", "b"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_chat_answers_line_by_line(raygraft: Command, tiny_model: Path) -> None:
    arguments = ("chat", "-m", tiny_model, "-n", 4, "--temp", 0, "--system", "Be short.")
    ended = raygraft(*arguments, "--json", stdin="Hi there\n\nAnd now?\n/exit\nnever read\n")
    assert (ended.code, ended.err) == (0, "")
    messages = json.loads(ended.out)["messages"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert messages[3]["content"] == "And now?"
    forgetful = raygraft(*arguments, "--json", stdin="Hi there\n/clear\nAnd now?\n")
    assert len(json.loads(forgetful.out)["messages"]) == 3


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_chat_goes_on_after_a_message_that_is_too_long(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("chat", "-m", tiny_model, "-n", 2, stdin=f"{'word ' * 400}\nHi\n")
    assert ended.code == 0
    assert "error: the prompt has" in ended.err
    assert len(ended.out.splitlines()) >= 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_model_is_the_default(raygraft: Command, demo_model: Path) -> None:
    prompt = "The capital of France is"
    ended = raygraft("run", "-p", prompt, "-n", 3, "--temp", 0, "-c", 64, "--json")
    answer = json.loads(ended.out)
    assert answer["plan"]["model"] == demo_model.name
    assert "Paris" in answer["text"]
