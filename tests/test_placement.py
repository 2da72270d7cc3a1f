"""Machine files, and how a plan spreads a run over one: workers, shards, memory of a device, and time where known."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfimprove import bounds, machine_file, memory, pace, recipe_file, store
from selfimprove.data import SHIPPED
from selfimprove.errors import UserError
from selfimprove.machine_file import Hardware
from selfimprove.plan import Sources, find_step
from selfimprove.recipe import Adapter, Machine
from selfimprove.report import spread
from tests.conftest import SMALL, selfimprove

GIB = 2**30
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
EIGHT_B = 8_030_261_248


def written(text: str) -> str:
    Path("machine.toml").write_text(text)
    return "machine.toml"


def planned(*arguments: str) -> dict[str, dict]:
    """What a plan says of the machine, by `1/label`."""
    result = selfimprove("plan", *arguments, "--json")
    assert result.code == 0, result.err
    return {f"{p['iteration']}/{p['stage'].partition('-')[2]}": p["machine"] for p in json.loads(result.out)}


@pytest.mark.usefixtures("in_tmp")
class TestMachineFiles:
    def test_only_what_it_says_is_taken_from_it_and_set_stands_above(self):
        file = written("[machine]\nworkers = 3\nthreads = 2\n")
        assert machine_file.read(Path(file)).machine == {"workers": 3, "threads": 2}
        own = ["machine.max_num_seqs=7", "machine.threads=9", "machine.workers=4"]
        Path("my.toml").write_text(recipe_file.dump(recipe_file.load(recipe_file.find("default"), own)))
        found = machine_file.read(Path(file)).machine
        chosen = recipe_file.load(Path("my.toml"), ["machine.workers=5"], machine=found)
        assert (chosen.machine.max_num_seqs, chosen.machine.threads, chosen.machine.workers) == (7, 2, 5)

    def test_what_one_executor_was_told_goes_where_a_file_names_another(self):
        files = {
            "ray": "[machine]\nexecutor = 'ray'\nworkers = 24\nray_address = 'auto'\ntrain_tokens = 99\n",
            "static": "[machine]\nexecutor = 'static'\nnodes = 2\nrendezvous = 'a:1'\n",
            "local": "[machine]\nexecutor = 'local'\n",
        }
        path = Path("my.toml")
        path.write_text(recipe_file.dump(recipe_file.load(recipe_file.find("default"))))
        for name in ("ray", "static", "ray", "local", "static", "local"):  # from one machine to the other
            chosen = recipe_file.load(path, machine=machine_file.read(Path(written(files[name]))).machine)
            path.write_text(recipe_file.dump(chosen))
            assert chosen.machine.executor == name
        assert chosen.machine == recipe_file.load(recipe_file.find("default")).machine.model_copy(
            update={"train_tokens": 99}
        )

    @pytest.mark.parametrize(
        ("text", "says", "hint"),
        [
            ("[machine]\nworker = 3\n", "machine.worker: unknown key", "workers"),
            ("[machine]\nworkers = 0\n", "machine.workers: input should be greater than or equal to 1", ""),
            ("[machine]\nworkers = '3'\n", "machine.workers: input should be a valid integer", ""),
            ("[machine]\n[train]\nbeta = 1\n", "train: unknown key", "machine, hardware"),
            ("[hardware]\ndevice = 'x'\nmemory_gib = 1\ndevices_per_node = 1\n", "machine: is missing", ""),
            ("[machine]\n[hardware]\nmemory_gib = 1\ndevices_per_node = 1\n", "hardware.device: is missing", ""),
            ("[machine]\n[hardware]\ndevise = 'x'\n", "hardware.devise: unknown key", "device"),
            ("[machine\n", "is not valid TOML", "examples"),
        ],
    )
    @pytest.mark.parametrize("command", [["iterate", "default"], ["check", "default"], ["plan", "default"]])
    def test_what_is_wrong_in_one_is_told_with_what_is_known_there(self, command, text, says, hint):
        result = selfimprove(*command, "--machine", written(text))
        assert result.code == 1
        assert says in result.err
        assert hint in result.err.partition("hint: ")[2]
        assert not Path("runs").exists()

    def test_one_that_is_not_there(self):
        result = selfimprove("iterate", "default", "--machine", "none.toml")
        assert (result.code, "none.toml cannot be read" in result.err) == (1, True)

    def test_check_takes_it(self):
        result = selfimprove("check", "default", "--machine", written("[machine]\nworkers = 2\n"))
        assert result.code == 0, result.err


class TestARunMovesToAnotherMachine:
    def test_nothing_is_made_anew_and_what_was_used_is_written_down(self, fake_run):
        file = written("[machine]\nmax_num_seqs = 9\n")
        before = {p: p.stat().st_mtime_ns for p in fake_run.rglob("iter-*/**/*") if p.is_file()}
        told = selfimprove(
            "iterate", "default", "--run", "fake", "--rounds", "2", "--engine", "fake", *SMALL, "--machine", file
        )
        assert told.code == 0, told.err
        assert "nothing to do" in told.err
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert recipe_file.load(fake_run / "recipe.toml").machine.max_num_seqs == 9

    def test_resume_takes_one(self, fake_run):
        shutil.rmtree(fake_run / "iter-002/5-evaluate")
        assert selfimprove("resume", "fake", "--machine", written("[machine]\nmax_num_seqs = 11\n")).code == 0
        assert recipe_file.load(fake_run / "recipe.toml").machine.max_num_seqs == 11
        manifest = store.read_manifest(fake_run / "iter-002/5-evaluate")
        receipt = json.loads((fake_run / f"receipts/{manifest.environment['receipt']}.json").read_text())
        assert receipt["machine"] == {
            "executor": "local", "workers": 1, "tensor_parallel": 1, "num_processes": 1, "nodes": 1, "sharding": "ddp",
        }  # fmt: skip  # how the work is spread, and no address


@pytest.mark.parametrize("requests", [0, 1, 255, 256, 257, 2048, 5000, 16_383, 16_384, 16_385, 50_000, 1_000_000])
def test_shards_are_those_that_the_executors_cut(requests):
    from selfimprove.execution.shard import Work, cut, windows

    work = Work("complete", "m", "identity", {}, None, "logs")
    rows = iter(range(requests))
    sizes = windows()
    taken = iter(lambda: list(itertools.islice(rows, next(sizes))), [])
    assert pace.shards(requests) == sum(len(list(cut(work, some))) for some in taken)


def test_a_paper_sized_round_has_shards_for_dozens_of_workers():
    assert pace.shards(50_000) == 6 * 8


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("cut", [[1], [3, 3], [28], [7, 1, 16]])
def test_how_many_are_busy_is_what_a_simulation_of_turns_says(workers, cut):
    turns = 0
    for shards in cut:
        left = shards
        while left > 0:
            left -= min(left, workers)
            turns += 1
    assert pace.busy(workers, cut) == pytest.approx(sum(cut) / turns)
    assert pace.busy(None, cut) is None
    assert pace.busy(workers, None) == workers


class TestMemory:
    @pytest.fixture
    def rules(self, in_tmp):
        shutil.copytree(SHIPPED["demo:model"], "model")
        Path("model/config.json").write_text(json.dumps(LLAMA))
        settings = ["model.path=model", "engine.dtype=bfloat16", "engine.max_model_len=4096"]
        chosen = recipe_file.load(recipe_file.find("default"), settings)
        sources = Sources(store.Run(Path("runs/none")), chosen)
        return lambda *more: (
            found := recipe_file.load(recipe_file.find("default"), [*settings, *more]),
            bounds.Rules(found, sources, bounds.Model(EIGHT_B, 10_000_000)),
        )

    def hardware(self, gib: float = 80, device: str = "H100") -> Hardware:
        return Hardware(device=device, memory_gib=gib, devices_per_node=8)

    @pytest.mark.parametrize("devices", [1, 2, 4])
    def test_an_engine_holds_its_weights_and_gives_the_rest_of_its_share_to_the_cache(self, rules, devices):
        chosen, known = rules(f"machine.tensor_parallel={devices}", "machine.gpu_memory_utilization=0.9")
        held = memory.of_engine(chosen, known, self.hardware())
        assert held["weights"] == EIGHT_B * 2 // devices
        assert sum(held.values()) == pytest.approx(0.9 * 80 * GIB, rel=1e-9)
        assert memory.tight(held, chosen, known, self.hardware()) == []
        assert memory.of_engine(chosen, known, None) == {"weights": EIGHT_B * 2 // devices}  # the share of what?

    def test_an_engine_that_could_not_start(self, rules):
        chosen, known = rules()
        small = self.hardware(16)
        (said,) = memory.tight(memory.of_engine(chosen, known, small), chosen, known, small)
        assert "leave no cache" in said
        assert memory._token(chosen, known) == 2 * 32 * 8 * 128 * 2
        assert memory._token(*rules("machine.tensor_parallel=4")) == 2 * 32 * 2 * 128 * 2  # heads are divided
        # Llama 3's 8B takes 128 KiB a token: 2 x 32 layers x 8 heads x 128 x 2 bytes; 4096 of them are half a GiB
        weights = EIGHT_B * 2 / GIB
        for room, fits in ((0.51, True), (0.49, False)):
            on = self.hardware((weights + room) / chosen.machine.gpu_memory_utilization)
            said = memory.tight(memory.of_engine(chosen, known, on), chosen, known, on)
            assert bool(said) is not fits
            assert fits or "holds no sequence of engine.max_model_len = 4096" in said[0]

    def test_a_processor_holds_all_workers_of_the_node(self, rules):
        chosen, known = rules("machine.workers=3", "machine.kv_cache_gib=2")
        cpu = self.hardware(50, "cpu")
        held = memory.of_engine(chosen, known, cpu)
        assert held == {"weights": EIGHT_B * 2, "cache": 2 * GIB}
        assert "3 engines hold 50.9 GiB, and the node has 50 GiB" in memory.tight(held, chosen, known, cpu)
        assert memory.tight(held, chosen, known, self.hardware(51, "cpu")) == []

    def test_fsdp_divides_a_training_and_what_lies_beside_it_counts(self, rules):
        chosen, known = rules(
            "machine.executor=static", "machine.num_processes=8", "machine.nodes=2", "machine.sharding=fsdp"
        )
        step = find_step(chosen, "1/train")
        held = memory.of_training(step, step.section.optimizer, chosen, known.model)
        assert held.pop("logits") == chosen.machine.logits_mib * 2**20
        assert sum(held.values()) == pytest.approx(EIGHT_B * 16 / 16, rel=1e-6)  # 4 + 4 + 8 bytes, on 16
        assert "references" not in held  # it scored before, and is gone
        moving = step.section.model_copy(update={"reference": "ema", "ema_decay": 0.9})
        beside = memory.of_training(step._replace(section=moving), moving.optimizer, chosen, known.model)
        assert beside["references"] == math.ceil(EIGHT_B * 4 / 16)
        low = step.section.optimizer.model_copy(update={"adapter": Adapter(rank=16)})
        adapted = memory.of_training(step, low, chosen, known.model)
        assert adapted["gradients"] == 16 * 10_000_000 * 4 // 16
        assert adapted["references" if step.section.references else "weights"] > 0


class TestTime:
    @pytest.fixture(autouse=True)
    def measured(self, fake_run):
        """Round 1 is measured, by one worker and one process, as if on a GPU."""
        shutil.rmtree(fake_run / "iter-002")
        self.run = fake_run
        self.on([{"name": "NVIDIA H100 80GB HBM3"}])

    def on(self, gpus: list | None) -> None:
        for path in (self.run / "receipts").glob("*.json"):
            told = json.loads(path.read_text())
            told["hardware"]["gpus"] = gpus
            path.write_text(json.dumps(told))

    def seconds(self, stage: str) -> float:
        return store.read_manifest(self.run / f"iter-001/{stage}").seconds

    def test_workers_and_processes_divide_what_was_measured(self):
        alone = planned("fake", "--machine", written("[machine]\nworkers = 1\n"))["2/evaluate"]
        assert alone["seconds"] == pytest.approx(self.seconds("5-evaluate"), rel=1e-6)
        assert alone["work"][0]["shards"] == [3, 3]  # 650 prompts, greedy and sampled
        two = planned("fake", "--machine", written("[machine]\nworkers = 2\nnum_processes = 4\n"))
        assert two["2/evaluate"]["seconds"] == pytest.approx(alone["seconds"] * 4 / 6)  # 3 shards take 2 turns
        assert two["2/train"]["seconds"] == pytest.approx(
            planned("fake", "--machine", written("[machine]\nnum_processes = 1\n"))["2/train"]["seconds"] / 4
        )
        many = planned("fake", "--machine", written("[machine]\nworkers = 64\n"))["2/evaluate"]
        assert many["seconds"] == pytest.approx(alone["seconds"] / 3)  # no more than three have something to do
        assert many["notes"] == ["shards for 3 at once: 61 of 64 workers have nothing to do"]

    def test_workers_of_a_node_share_its_processor(self):
        self.on(None)
        for machine in ("workers = 1", "workers = 4\nnum_processes = 2"):
            told = planned("fake", "--machine", written(f"[machine]\n{machine}\n"))
            assert told["2/evaluate"]["seconds"] == pytest.approx(self.seconds("5-evaluate"), rel=1e-6)
            assert told["2/train"]["seconds"] == pytest.approx(self.seconds("4-train"), rel=1e-6)
        for machine, stage in (
            ("executor = 'ray'\nworkers = 4", "evaluate"),
            ("executor = 'static'\nnodes = 2", "train"),
        ):
            told = planned("fake", "--machine", written(f"[machine]\n{machine}\n"))[f"2/{stage}"]
            assert told["seconds"] is None
            assert "share its processor" in told["how"]

    def test_a_time_on_another_device_says_nothing_and_rates_are_taken(self):
        hardware = "[hardware]\ndevice = 'A100'\nmemory_gib = 80\ndevices_per_node = 8\n"
        told = planned("fake", "--machine", written("[machine]\nworkers = 2\n" + hardware))
        assert told["2/evaluate"]["seconds"] is None
        assert "measured on NVIDIA H100 80GB HBM3, which says nothing about A100" in told["2/evaluate"]["how"]
        rated = planned(
            "fake", "--machine", written("[machine]\nworkers = 2\n" + hardware + "generation_tokens_per_s = 100\n")
        )
        tokens = next(
            p["estimate"]["tokens"]
            for p in json.loads(selfimprove("plan", "fake", "--json").out)
            if (p["iteration"], p["stage"]) == (2, "5-evaluate")
        )
        assert rated["2/evaluate"]["seconds"] == pytest.approx(tokens / 100 / 1.5)
        assert rated["2/train"]["seconds"] is None  # it has no rate for that
        same = hardware.replace("A100", "H100 80GB")
        assert planned("fake", "--machine", written("[machine]\n" + same))["2/evaluate"]["seconds"] is not None

    def test_a_receipt_of_an_earlier_version_does_not_say_how_many_worked(self):
        for path in (self.run / "receipts").glob("*.json"):
            told = json.loads(path.read_text())
            del told["machine"]
            path.write_text(json.dumps(told))
        told = planned("fake", "--machine", written("[machine]\nworkers = 2\n"))["2/evaluate"]
        assert told["seconds"] is None
        assert "does not say on how many workers" in told["how"]

    def test_static_ranks_are_those_of_the_file_or_of_the_environment_or_unknown(self, monkeypatch):
        for name in ("WORLD_SIZE", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        file = written("[machine]\nexecutor = 'static'\n")
        unknown = planned("fake", "--machine", file)["2/evaluate"]
        assert (unknown["work"][0]["workers"], unknown["seconds"]) == (None, None)
        assert "static ranks is not known" in unknown["how"]
        monkeypatch.setenv("SLURM_NTASKS", "2")
        assert planned("fake", "--machine", file)["2/evaluate"]["work"][0]["workers"] == 2
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert planned("fake", "--machine", file)["2/evaluate"]["work"][0]["workers"] == 3
        said = "[hardware]\ndevice = 'H100'\nmemory_gib = 80\ndevices_per_node = 8\nranks = 5\n"
        told = planned("fake", "--machine", written("[machine]\nexecutor = 'static'\n" + said))["2/evaluate"]
        assert told["work"][0]["workers"] == 5
        assert told["seconds"] == pytest.approx(self.seconds("5-evaluate") / 3)

    def test_without_a_machine_file_a_plan_is_as_before(self):
        assert all("machine" not in one for one in json.loads(selfimprove("plan", "fake", "--json").out))
        assert "machine:" not in selfimprove("plan", "fake").out

    def test_it_answers_without_torch(self):
        file = written("[machine]\nworkers = 2\n[hardware]\ndevice = 'cpu'\nmemory_gib = 8\ndevices_per_node = 1\n")
        command = [sys.executable, "-X", "importtime", "-m", "selfimprove", "plan", "fake", "--machine", file]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "machine: 1 x cpu of 8 GiB a node, executor local, 2 engines" in ended.stdout
        imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "vllm", "ray"}


def test_rates_take_what_is_trained_apart_from_what_is_written(in_tmp):
    """Of `synpo`: generator and improver are trained first, and its search for beta scores what is there."""
    hardware = "[hardware]\ndevice = 'A100'\nmemory_gib = 80\ndevices_per_node = 8\n"
    rates = "generation_tokens_per_s = 10.0\ntraining_tokens_per_s = 1000.0\n"
    file = written("[machine]\nworkers = 4\nnum_processes = 2\n" + hardware + rates)
    searched = [
        *("--set", "train.search={betas=[1.0, 2.0]}"),
        *("--set", "train.loss={name='simpo', gamma=1.0}"),
    ]
    told = planned("synpo", "--machine", file, *searched)
    chosen = recipe_file.load(recipe_file.find("synpo"))
    seeds = len(SHIPPED["demo:seeds"].read_text().splitlines())
    trained = seeds * chosen.engine.max_model_len * chosen.synthesize.generator.epochs
    written_tokens = chosen.synthesize.prompts * chosen.synthesize.sampling.max_tokens
    turns = math.ceil(pace.shards(chosen.synthesize.prompts) / 4)
    at_once = pace.shards(chosen.synthesize.prompts) / turns
    assert told["1/synthesize"]["seconds"] == pytest.approx(trained / 2000 + written_tokens / (10 * at_once))
    assert told["2/synthesize"]["seconds"] == pytest.approx(written_tokens / (10 * at_once))  # it is trained once
    estimates = json.loads(selfimprove("plan", "synpo", "--json", *searched).out)
    tokens = {f"{p['iteration']}/{p['stage'][2:]}": p["estimate"]["tokens"] for p in estimates}
    assert [work["kind"] for work in told["1/train"]["work"]] == ["ask", "train"]
    assert told["1/train"]["seconds"] == pytest.approx(tokens["1/train"] / 2000)
    unknown = planned("synpo", "--machine", written("[machine]\n" + hardware + "generation_tokens_per_s = 10.0\n"))
    assert unknown["2/synthesize"]["seconds"] is not None
    assert unknown["1/synthesize"]["how"].endswith("[hardware] has no training_tokens_per_s")


class TestWhatIsShown:
    def test_a_machine_that_is_too_small_is_told(self, in_tmp):
        text = "[machine]\nworkers = 9\nnum_processes = 12\n"
        hardware = "[hardware]\ndevice = 'toy'\nmemory_gib = 0.25\ndevices_per_node = 8\n"
        told = planned("default", *SMALL, "--machine", written(text + hardware))
        assert told["1/generate"]["warnings"][0] == "9 workers on one node need 9 devices, and it has 8"
        warnings = told["1/train"]["warnings"]
        assert warnings[0] == "12 training processes on one node need 12 devices, and it has 8"
        assert warnings[1].startswith("training holds 0.3 GiB on a device, and toy has 0.25 GiB: ")
        shown = selfimprove("plan", "default", *SMALL, "--machine", "machine.toml").out
        assert "warning: 0/control, 1-4/synthesize" not in shown  # only round 1 trains the generator
        assert "warning: 0/control, 1/synthesize, 1-4/train: 12 training processes" in shown
        assert "time: " in shown

    def test_stages_that_follow_one_another_are_told_as_one(self):
        stages = ["0/evaluate", "1/generate", "1/evaluate", "2/generate", "2/evaluate", "4/generate"]
        assert spread.together(stages) == "0-2/evaluate, 1-2/generate, 4/generate"

    def test_a_device_is_named_as_it_is_called_for_short(self):
        receipt = {"hardware": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}], "cpu": "x"}}
        for device, same in (("H100", True), ("h100 80gb", True), ("A100", False), ("cpu", False)):
            hardware = Hardware(device=device, memory_gib=80, devices_per_node=8)
            assert pace._same(hardware, receipt) is same
        cpu = Hardware(device="CPU", memory_gib=64, devices_per_node=1)
        assert pace._same(cpu, {"hardware": {"gpus": None, "cpu": "x"}})


def test_a_machine_file_has_the_same_keys_as_a_recipe():
    assert machine_file._File.model_fields["machine"].annotation is Machine
    with pytest.raises(UserError, match="pipelines: unknown key"):
        recipe_file.load(recipe_file.find("default"), machine={"pipelines": 1})
