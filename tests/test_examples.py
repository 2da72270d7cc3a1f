"""The launch examples: each file is parsed by what reads it, and each command line in them is dry-run as it stands."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

from selfimprove import cli, machine_file, preflight, recipe_file
from selfimprove.data import SHIPPED
from selfimprove.execution.ranks import rank_and_world
from tests.conftest import QUICK, cut, selfimprove
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
MACHINES = sorted(EXAMPLES.glob("*/*.toml"))
SCRIPTS = sorted([*EXAMPLES.glob("*/*.sh"), *EXAMPLES.glob("*/*.sbatch")])
KNOWN = {
    name: set(fields)
    for name, fields in tomllib.loads((ROOT / "tests/data/launch_fields.toml").read_text(encoding="utf-8")).items()
}

FAKE = """#!/usr/bin/env bash
{ printf '%s\\0' "$(basename "$0")" "$@"; } >> "$RECORD/$$-$RANDOM.argv"
env -0 > "$(ls -t "$RECORD"/$$-*.argv | head -n 1 | sed 's/argv$/env/')"
"""
SRUN = """#!/usr/bin/env bash
# the ranks of srun, one after the other
while [[ "$1" == --* ]]; do echo "$1" >> "$RECORD/srun"; shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) "$@" || exit $?
done
"""
SBATCH_PROGRAM = """#!/usr/bin/env bash
# runs the script as Slurm does: from a copy, with the variables of the job
echo "$@" >> "$RECORD/sbatch"
echo "4711;cluster"
"""


class Call:
    """A command that an example made: its arguments and environment."""

    def __init__(self, argv: Path) -> None:
        self.words = argv.read_text().split("\0")[:-1]
        said = argv.with_suffix(".env").read_text().split("\0")[:-1]
        self.environment = dict(one.split("=", 1) for one in said)

    @property
    def arguments(self) -> list[str]:
        return self.words[1:]

    @property
    def machine(self) -> Path:
        return Path(self.arguments[self.arguments.index("--machine") + 1])

    @property
    def settings(self) -> list[str]:
        return [word for before, word in zip(self.arguments, self.arguments[1:], strict=False) if before == "--set"]

    @property
    def rank(self) -> tuple[int, int]:
        """As the executor `static` reads it: RANK and WORLD_SIZE before SLURM_PROCID and SLURM_NTASKS."""
        of = self.environment
        return rank_and_world(of) if {"RANK", "SLURM_PROCID"} & of.keys() else (-1, -1)


@pytest.fixture
def calls(in_tmp, monkeypatch):
    """Run a script of the examples with programs that only write down how they were called."""
    programs, record = in_tmp / "bin", in_tmp / "record"
    programs.mkdir()
    record.mkdir()
    for name, text in {"selfimprove": FAKE, "srun": SRUN, "sbatch": SBATCH_PROGRAM}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (in_tmp / "work").mkdir()

    def run(script: Path, *arguments: str, **environment: str) -> list[Call]:
        inherited = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(in_tmp), "RECORD": str(record)}
        ended = subprocess.run(
            [script, *arguments], env=inherited | environment, cwd=in_tmp / "work", capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        found = [Call(path) for path in record.glob("*.argv")]
        return sorted(found, key=lambda call: (call.rank, call.arguments))

    run.record = record
    return run


def parsed(arguments: list[str]) -> None:
    """The command line is one of ours: our own program reads it, and the recipe with its machine is valid."""
    group = typer.main.get_command(cli.app)
    name, *rest = arguments
    if name == "work" and name not in group.commands:
        pytest.skip("the command `work` is not there yet")
    assert name in group.commands, name
    context = group.commands[name].make_context(name, list(rest))
    if name == "iterate":
        given = context.params
        where = machine_file.read(given["machine"])
        chosen = recipe_file.load(recipe_file.find(given["recipe"]), given["settings"], machine=where.machine)
        assert where.hardware is not None
        assert chosen.machine.executor in ("local", "static", "ray")


@pytest.mark.parametrize("path", MACHINES, ids=lambda p: f"{p.parent.name}/{p.name}")
class TestMachineFiles:
    def test_it_is_one_says_how_to_run_it_and_plans_the_embedded_default(self, path, in_tmp):
        where = machine_file.read(path)
        assert where.hardware
        header = path.read_text().split("\n\n")[0]
        assert "Run:" in header
        assert "Cost:" in header
        told = selfimprove("plan", "default", "--machine", str(path), "--json")
        assert told.code == 0, told.err
        stages = {f"{p['iteration']}/{p['stage'][2:]}": p["machine"] for p in json.loads(told.out)}
        asks, trains = stages["1/generate"]["work"][0], stages["1/train"]["work"][0]
        machine = where.machine
        assert asks["workers"] == (where.hardware.ranks if machine["executor"] == "static" else machine["workers"])
        assert trains["workers"] == machine.get("num_processes", 1) * machine.get("nodes", 1)
        assert not any(stage["warnings"] for stage in stages.values())

    @pytest.mark.parametrize("recipe", [p.stem for p in recipe_file.shipped_recipes() if p.stem.endswith("_7b")])
    def test_it_goes_with_every_recipe_of_a_papers_size(self, path, recipe):
        where = machine_file.read(path)
        chosen = recipe_file.load(recipe_file.find(recipe), machine=where.machine)
        assert chosen.machine.model_dump(include=set(where.machine)) == where.machine
        again = recipe_file.load(recipe_file.find(recipe))
        assert recipe_file.differences(again, chosen) == []  # nothing that a key depends on


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
class TestScripts:
    def test_bash_reads_it_and_it_can_be_started(self, path):
        subprocess.run(["bash", "-n", path], check=True)
        assert os.access(path, os.X_OK)
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env bash\n#")
        assert "set -euo pipefail" in text

    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
    def test_shellcheck_finds_nothing(self, path):
        told = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert told.returncode == 0, told.stdout


class TestOneNode:
    def test_the_commands_it_runs(self, calls):
        script = EXAMPLES / "one_node_8_gpus/run.sh"
        found = calls(script, "--rounds", "2", RECIPE="default")
        assert [call.arguments[0] for call in found] == ["iterate", "report"]
        parsed(found[0].arguments)
        parsed(found[1].arguments)
        assert found[0].arguments[-2:] == ["--rounds", "2"]
        where = machine_file.read(found[0].machine)
        assert where.machine["workers"] == where.machine["num_processes"] == where.hardware.devices_per_node == 8

    def test_a_small_run_with_it(self, in_tmp):
        cut(40)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "RECIPE": "default"
        }  # fmt: skip
        # here are no eight devices: --set stands above the machine file
        one = ["--set", "machine.workers=1", "--set", "machine.num_processes=1", "--set", "synthesize.prompts=30"]
        command = [EXAMPLES / "one_node_8_gpus/run.sh", "--rounds", "1", *QUICK, *one]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert Path("runs/default/report.html").is_file()
        made = recipe_file.load(Path("runs/default/recipe.toml")).machine
        assert (made.workers, made.num_processes, made.sharding) == (1, 1, "fsdp")  # of --set, --set, the file


class TestSlurm:
    def test_every_directive_is_one_of_sbatchs(self):
        for path in (EXAMPLES / "slurm").glob("*.sbatch"):
            before, _, body = path.read_text().partition("\nset -euo pipefail")
            directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", before, re.MULTILINE)
            assert len(directives) == before.count("\n#SBATCH")
            assert "#SBATCH" not in body  # sbatch does not read on after the first command
            given = dict(directives)
            assert set(given) <= KNOWN["sbatch"], path
            assert re.fullmatch(r"(B:)?TERM@\d+", given["signal"])
            assert re.fullmatch(r"\d+:\d\d:\d\d", given["time"])
            assert given["requeue"] == ""

    def test_a_rank_on_each_gpu_of_one_allocation(self, calls):
        directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (EXAMPLES / "slurm/run.sbatch").read_text(), re.M))
        nodes, tasks = int(directives["nodes"]), int(directives["ntasks-per-node"])
        assert directives["gpus-per-node"] == directives["ntasks-per-node"]
        found = calls(
            EXAMPLES / "slurm/run.sbatch", "--rounds", "2",
            RECIPE="default", SLURM_SUBMIT_DIR=str(ROOT), WORK=".",
            SLURM_JOB_ID="12345", SLURM_JOB_NODELIST="node[1-2]",
            SLURM_NTASKS=str(nodes * tasks), SLURM_NTASKS_PER_NODE=str(tasks), SLURM_CPUS_PER_TASK="8",
        )  # fmt: skip
        driver, *followers = found
        assert [call.rank for call in found] == [(rank, nodes * tasks) for rank in range(nodes * tasks)]
        assert {call.environment["CUDA_VISIBLE_DEVICES"] for call in found} == {str(gpu) for gpu in range(tasks)}
        assert driver.arguments[0] == "iterate"
        assert driver.settings == ["machine.nodes=16"]
        assert {call.environment["SLURM_JOB_NODELIST"] for call in found} == {"node[1-2]"}  # where training meets
        parsed(driver.arguments)
        where = machine_file.read(driver.machine)
        assert where.machine["executor"] == "static"
        assert where.machine["nodes"] == where.hardware.ranks == nodes * tasks
        assert "--cpus-per-task=8" in (calls.record / "srun").read_text().split()
        for call in followers:
            assert call.arguments == ["work", "default"]
        parsed(followers[0].arguments)

    def test_the_array_follows_and_the_other_job_drives(self, calls):
        common = {"RECIPE": "default", "SLURM_SUBMIT_DIR": str(ROOT), "WORK": "."}
        of_job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}  # every batch script has them, and is no rank 0 of one
        for task in range(1, 4):
            calls(
                EXAMPLES / "slurm/array.sbatch", SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_MAX="3",
                **common, **of_job,
            )  # fmt: skip
        driver, *followers = calls(EXAMPLES / "slurm/train.sbatch", "--rounds", "2", WORLD_SIZE="4", **common, **of_job)
        assert driver.rank == (0, 4)
        assert [call.rank for call in followers] == [(1, 4), (2, 4), (3, 4)]
        where = machine_file.read(driver.machine)
        assert where.machine["executor"] == "static"
        assert where.machine.get("nodes", 1) == 1  # the followers do not train
        parsed(driver.arguments)
        for call in followers:
            assert call.arguments == ["work", "default"]
        parsed(followers[0].arguments)

    def test_what_is_submitted(self, calls):
        calls(EXAMPLES / "slurm/submit.sh", "--rounds", "2", WORKERS="3")
        array, train = (calls.record / "sbatch").read_text().splitlines()
        assert array == f"--parsable --array=1-3 {EXAMPLES}/slurm/array.sbatch"
        assert train == f"--dependency=after:4711 {EXAMPLES}/slurm/train.sbatch --rounds 2"
        where = machine_file.read(EXAMPLES / "slurm/array.toml")
        written = re.search(r"--array=1-(\d+)", (EXAMPLES / "slurm/array.sbatch").read_text())
        assert where.hardware.ranks == int(written[1]) + 1


class TestRayOnKubernetes:
    def job(self):
        text = (EXAMPLES / "ray_kubernetes/rayjob.yaml").read_text()
        text = re.sub(r"\$IMAGE\b", "registry.example/selfimprove:1", text).replace("$RECIPE", "default")
        claim, job = yaml.safe_load_all(text)
        assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
        return claim, job["spec"]

    def test_its_fields_are_kuberays(self):
        _, job = self.job()
        cluster = job["rayClusterSpec"]
        assert set(job) <= KNOWN["ray_job"]
        assert set(cluster) <= KNOWN["ray_cluster"]
        assert set(cluster["headGroupSpec"]) <= KNOWN["ray_head"]
        assert {"rayStartParams", "template"} <= set(cluster["headGroupSpec"])
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= KNOWN["ray_workers"]
            assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group)

    def test_every_pod_has_the_shared_volume_and_the_engines_have_gpus(self):
        claim, job = self.job()
        cluster = job["rayClusterSpec"]
        pods = [(cluster["headGroupSpec"], 1), *((g, g["replicas"]) for g in cluster["workerGroupSpecs"])]
        gpus = 0
        for group, number in pods:
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert set(mounts) == set(volumes)
            assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert mounts["runs"] == "/runs"
            assert container["resources"]["limits"] == container["resources"]["requests"]
            gpus += number * int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        where = machine_file.read(EXAMPLES / "ray_kubernetes/machine.toml")
        assert (where.machine["executor"], where.machine["ray_address"]) == ("ray", "auto")
        assert where.machine["workers"] == gpus
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert where.machine["num_processes"] == int(head["nvidia.com/gpu"])  # training is on the head

    def test_the_job_runs(self, calls):
        _, job = self.job()
        script, *arguments = job["entrypoint"].split()
        inside = EXAMPLES / Path(script).relative_to("/opt/selfimprove/examples")
        found = calls(inside, *arguments, WORK=".")
        assert [call.arguments[0] for call in found] == ["iterate", "report"]
        for call in found:
            parsed(call.arguments)

    def test_the_pods_are_what_kubernetes_takes(self):
        kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
        claim, job = self.job()
        cluster = job["rayClusterSpec"]
        kubernetes.validate(claim, "1.30", strict=True)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
            kubernetes.validate(pod, "1.30", strict=True)


class TestSkyPilot:
    def task(self):
        return yaml.safe_load((EXAMPLES / "skypilot/task.yaml").read_text())

    def test_its_fields_are_skypilots(self):
        task = self.task()
        assert set(task) <= KNOWN["sky_task"]
        assert set(task["resources"]) <= KNOWN["sky_resources"]
        assert all(isinstance(value, str) for value in task["envs"].values())
        volume = yaml.safe_load((EXAMPLES / "skypilot/volume.yaml").read_text())
        assert volume["name"] in task["volumes"].values()
        assert volume["config"]["access_mode"] == "ReadWriteMany"
        assert task["file_mounts"]["/bucket"] == {"source": "${BUCKET}", "mode": "MOUNT"}
        where = machine_file.read(EXAMPLES / "skypilot/machine.toml")
        assert where.machine["store"].startswith("/bucket/")

    def test_skypilots_own_schemas_take_it(self):
        schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot is not installed")
        task = self.task()
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())
        jsonschema.validate(
            yaml.safe_load((EXAMPLES / "skypilot/volume.yaml").read_text()), schemas.get_volume_schema()
        )

    def test_a_rank_on_each_gpu_of_each_node(self, calls):
        task = self.task()
        name, gpus = task["resources"]["accelerators"].split(":")
        nodes = task["num_nodes"]
        assert task["run"].splitlines()[-1] == "examples/skypilot/node.sh"
        subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)
        for node in range(nodes):
            found = calls(
                EXAMPLES / "skypilot/node.sh", RECIPE="default", SKYPILOT_NODE_RANK=str(node),
                SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NUM_GPUS_PER_NODE=gpus, SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8",
            )  # fmt: skip
        world = nodes * int(gpus)
        assert [call.rank for call in found] == [(rank, world) for rank in range(world)]
        for rank, call in enumerate(found):
            assert call.environment["CUDA_VISIBLE_DEVICES"] == str(rank % int(gpus))
        driver, *followers = found
        assert driver.settings == [f"machine.nodes={world}"]
        meeting = {(call.environment["MASTER_ADDR"], call.environment["MASTER_PORT"]) for call in found}
        assert meeting == {("10.0.0.7", "29500")}
        where = machine_file.read(driver.machine)
        assert (where.hardware.ranks, where.hardware.device) == (world, name)
        parsed(driver.arguments)
        for call in followers:
            assert call.arguments == ["work", "default"]
        parsed(followers[0].arguments)

    def test_a_rank_that_fails_ends_the_node(self, in_tmp):
        programs = in_tmp / "bin"
        programs.mkdir()
        (programs / "selfimprove").write_text('#!/usr/bin/env bash\n[ "$RANK" = 1 ] && exit 7\nexec sleep 60\n')
        (programs / "selfimprove").chmod(0o755)
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin", "RECIPE": "default", "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "3", "SKYPILOT_NODE_IPS": "10.0.0.7",
        }  # fmt: skip
        ended = subprocess.run([EXAMPLES / "skypilot/node.sh"], env=environment, timeout=30)
        assert ended.returncode == 7


class TestPage:
    page = ROOT / "docs" / "cluster.md"

    def test_every_example_is_on_it_and_every_command_and_table_of_it_is_valid(self, tmp_path, monkeypatch):
        text = self.page.read_text(encoding="utf-8")
        for path in [*MACHINES, *SCRIPTS, *EXAMPLES.glob("*/*.yaml")]:
            assert f"../examples/{path.parent.name}/{path.name}" in text, path
        for link in re.findall(r"\]\(([^)#h][^)]*)\)", text):
            assert (ROOT / "docs" / link).exists(), link
        for number, snippet in enumerate(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)):
            file = tmp_path / f"{number}.toml"
            file.write_text(snippet)
            assert set(machine_file.read(file).hardware.model_dump()) == set(machine_file.Hardware.model_fields)
        monkeypatch.chdir(ROOT)
        commands = re.findall(r"^selfimprove (.*)$", text, re.MULTILINE)
        assert len(commands) >= 2
        for command in commands:
            parsed(shlex.split(command))

    def test_the_plan_that_it_shows_is_what_is_printed(self, in_tmp, monkeypatch):
        """Of a model of Llama 3.1 8B's shape, of which only the headers are there: nothing else is read."""
        of_shape(Path("model"), layers=32, hidden=4096, inner=14336, kept=1024, vocabulary=128_256)
        Path("data").mkdir()
        rows = {
            "ultrafeedback_seeds.jsonl": (18_000, lambda i: json.dumps({"prompt": f"sort {i}", "completion": "a b"})),
            "heldout.jsonl": (500, lambda i: json.dumps({"prompt": f"reverse {i}", "answer": "b a"})),
            "corpus.txt": (500, lambda i: f"some words about {i} and other things that come to mind"),
        }
        for name, (number, row) in rows.items():
            Path("data", name).write_text("".join(f"{row(i)}\n" for i in range(number)))
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(preflight, "check", lambda chosen: None)  # of 18,000 seeds, which would take half a minute
        command = ["plan", "synpo_7b", "--set", "model.path=model", "--set", "rounds=1"]
        told = selfimprove(*command, "--machine", str(EXAMPLES / "slurm/machine.toml"))
        assert told.code == 0, told.err
        printed = [line.rstrip() for line in told.out.partition("machine: ")[2].splitlines()]
        shown = re.search(r"```\nmachine: (.*?)\n```", self.page.read_text(encoding="utf-8"), re.DOTALL)[1]
        assert shown.splitlines() == printed


def of_shape(model: Path, layers: int, hidden: int, inner: int, kept: int, vocabulary: int) -> None:
    """A model directory with the demo's tokenizer, and weights that are nothing but their header."""
    shutil.copytree(SHIPPED["demo:model"], model)
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 32, "head_dim": 128}
    config |= {"num_key_value_heads": 8, "max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(config))
    shapes = {"embed": [vocabulary, hidden], "head": [vocabulary, hidden], "norm": [hidden]}
    for layer in range(layers):
        matrices = [[hidden, hidden], [kept, hidden], [kept, hidden], [hidden, hidden]]
        matrices += [[inner, hidden], [inner, hidden], [hidden, inner], [hidden], [hidden]]
        shapes |= {f"{layer}.{place}": shape for place, shape in enumerate(matrices)}
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
