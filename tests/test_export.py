"""`selfimprove export`: what it writes loads elsewhere, says what manifests say, and nothing of the machine."""

import inspect
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from markdown_it import MarkdownIt

from selfimprove.records import Pair
from selfimprove.store import read_rows, sha256
from tests.altered import change_manifest, change_recipe, decision, everything, gated, stage
from tests.conftest import QUICK, selfimprove

HOSTILE = '<script>alert(1)</script> | `x` [link](javascript:alert(2)) <img src=x onerror="alert(3)">\x1b[31m'
REAL_API = huggingface_hub.HfApi
TOKEN = "hf_ThisIsNoTokenOfAnyone"


def exported(*arguments: str) -> Path:
    result = selfimprove("export", "fake", "--out", "out", *arguments)
    assert result.code == 0, result.err
    assert result.out.startswith("out\n")
    return Path("out")


def refused(code: int, *says: str, arguments: tuple[str, ...] = (), out: str = "out") -> None:
    before = everything(Path())
    result = selfimprove("export", "fake", "--out", out, *arguments)
    assert (result.code, result.out) == (code, ""), result.err
    for said in (*says, "hint: "):
        assert said in " ".join(result.err.split())
    assert everything(Path()) == before


class TestItLoads:
    def test_the_model_is_the_runs_policy(self, fake_run):
        policy = stage(fake_run, 2, "train") / "policy"
        out = exported("--latest") / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Give the first word."}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        logits = [transformers.AutoModelForCausalLM.from_pretrained(of)(ids).logits for of in (out, policy)]
        assert torch.equal(*logits)
        assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 2

    def test_the_pairs_are_the_runs_pairs(self, fake_run, tmp_path):
        import datasets

        out = exported("--latest") / "dataset"
        cache = str(tmp_path / "cache")
        rows = datasets.load_dataset(str(out), split="train", cache_dir=cache)
        made = {k: read_rows(stage(fake_run, k, "label"), "pairs", Pair) for k in (1, 2)}
        assert rows["pair_id"] == [pair.pair_id for k in (1, 2) for pair in made[k]]
        assert rows["chosen"] == [pair.chosen for k in (1, 2) for pair in made[k]]
        assert rows["rejected_token_ids"] == [pair.rejected_token_ids for k in (1, 2) for pair in made[k]]
        second = datasets.load_dataset(str(out), "round_2", split="train", cache_dir=cache)
        assert second["pair_id"] == [pair.pair_id for pair in made[2]]

    def test_writing_into_it_does_not_change_the_run(self, fake_run):
        out = exported()
        for name in everything(out):
            (out / name).write_bytes(b"overwritten in place")
        assert selfimprove("verify", "fake").code == 0


class TestWhichRound:
    def test_the_best_one_unless_said_otherwise(self, fake_run):
        best = (fake_run / "best").readlink().name[-1]
        assert f"# fake-round-{best}\n" in (exported() / "README.md").read_text()

    @pytest.mark.parametrize(("arguments", "number"), [(("--iteration", "1"), 1), (("--latest",), 2)])
    def test_another_one(self, fake_run, arguments, number):
        out = exported(*arguments)
        assert f"# fake-round-{number}\n" in (out / "README.md").read_text()
        policy = stage(fake_run, number, "train") / "policy"
        assert sha256(out / "model" / "model.safetensors") == sha256(policy / "model.safetensors")

    def test_a_gate_that_promoted_none_leaves_no_best_one(self, fake_run):
        gated(fake_run, {1: decision("keep", 0, 1), 2: decision("keep", 0, 2)})
        refused(1, "has promoted no round", "--latest")

    def test_pairs_of_a_round_that_was_rolled_back_are_not_the_models(self, fake_run):
        gated(fake_run, {1: decision("roll back", 0, 0), 2: decision("promote", 2, 2)})
        out = exported()
        assert everything(out / "dataset" / "data") == ["round-002-00000.parquet"]
        card = (out / "README.md").read_text()
        assert "| round 2 | 2 |" in card
        assert "| round 1 |" not in card
        assert "by other prompts than these: **promote**" in card
        assert "the round that the run's gate promoted last" in card

    def test_at_most_one_way_to_say_it(self, fake_run):
        refused(2, "do not go together", arguments=("--latest", "--iteration", "1"))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(card: Path) -> Tags:
    """The card as a renderer that lets HTML through has it."""
    body = card.read_text(encoding="utf-8").split("---\n", 2)[2]
    tags = Tags()
    tags.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    return tags


class TestCards:
    def test_the_model_card_says_what_the_artifacts_say(self, fake_run):
        out = exported("--latest", "--license", "apache-2.0")
        card = huggingface_hub.ModelCard.load(out / "README.md")
        assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
        assert {"arxiv:2405.14734", "arxiv:2410.06961"} <= set(card.data.tags)
        scores = json.loads((stage(fake_run, 2, "evaluate") / "scores.json").read_text())
        assert [result.metric_value for result in card.data.eval_results] == [
            scores["scores"][mode]["value"] for mode in ("greedy", "sampled")
        ]
        for of in scores["scores"].values():
            low, high = (f"{bound:.3f}".replace("0.", ".", 1) for bound in of["ci95"])
            assert f"[{low}, {high}]" in card.text
        manifest = json.loads((stage(fake_run, 2, "train") / "manifest.json").read_text())
        assert f"| round 2 | 2 | {manifest['rows']['rows_in']} | {manifest['metrics']['policy rows']} |" in card.text
        evaluated = json.loads((stage(fake_run, 2, "evaluate") / "manifest.json").read_text())
        assert f"| 650 | {evaluated['ingredients']['inputs']['heldout']} |" in card.text
        for limit in ("toy", "fake engine", "Not measured: other tasks", "No gate looked at this round"):
            assert limit in card.text
        assert "licence is unknown" not in card.text
        gain = scores["comparisons"]["base"]["greedy"]
        (said,) = [line for line in card.text.splitlines() if line.startswith("- greedy score against the base")]
        assert f"{gain['n']} prompts: " in said
        for number in (gain["difference"], *gain["ci95"]):
            assert f"{abs(number):.3f}".replace("0.", ".", 1) in said

    def test_the_dataset_card_says_what_the_manifests_say(self, fake_run):
        out = exported("--latest")
        card = huggingface_hub.DatasetCard.load(out / "dataset" / "README.md")
        assert card.data.license == "unknown"
        assert "licence is unknown" in card.text
        for k in (1, 2):
            manifest = json.loads((stage(fake_run, k, "label") / "manifest.json").read_text())
            for reason, count in manifest["rows"]["quarantined"].items():
                assert f"| {k} | {reason} | {count} |" in card.text
            shard = out / "dataset" / "data" / f"round-00{k}-00000.parquet"
            pairs = manifest["metrics"]["pairs"]
            assert f"| {pairs} | verifier (checker = demo_world) | {sha256(shard)} |" in card.text
        for column in Pair.__struct_fields__:
            assert column in card.text

    def test_input_files_of_every_form_are_counted(self, cut_data):
        import gzip

        seeds = [json.loads(row) for row in Path("seeds.jsonl").read_text().splitlines()]
        Path("seeds.json").write_text(json.dumps(seeds, indent=1))
        held_out = Path("heldout.jsonl").read_bytes().splitlines(keepends=True)
        with gzip.open("heldout.jsonl.gz", "wb") as file:
            file.writelines(held_out[:30])
        Path("other.jsonl").write_bytes(b"".join(held_out[30:]))
        benchmark = '[{name="own", kind="prompts", path="other.jsonl", judge={name="verifier", checker="demo_world"}}]'
        settings = ["data.seeds=seeds.json", "data.heldout=heldout.jsonl.gz", f"evaluate.benchmarks={benchmark}"]
        given = [*QUICK, "--rounds", "1", *(word for one in settings for word in ("--set", one))]
        made = selfimprove("iterate", "--run", "fake", *given)
        assert made.code == 0, made.err
        card = (exported() / "README.md").read_text()
        assert "| seeds.json | prompts, and gold answers where a method uses them | 40 |" in card
        assert "| heldout.jsonl.gz | prompts of the scores below; they never enter training | 30 |" in card
        assert "| other.jsonl | prompts of the benchmark own | 10 |" in card
        assert selfimprove("report", "fake").code == 0
        assert str(Path("other.jsonl").resolve()) in Path("runs/fake/report.html").read_text()

    def test_nothing_says_where_it_was_made(self, fake_run, tmp_path):
        place = str(tmp_path / "secret-place" / "seeds.jsonl")
        address = "http://10.1.2.3:8000/v1"

        def change(told):
            told["data"]["seeds"] = place
            told["servers"] = {"judge": {"url": address, "model": "judge-9b", "api_key_env": "MY_KEY"}}

        change_recipe(fake_run, change)
        directory = stage(fake_run, 2, "train")
        config = json.loads((directory / "policy" / "config.json").read_text())
        config |= {"_name_or_path": place, "tokenizer_file": place, "architectures": config["architectures"]}
        (directory / "policy" / "config.json").write_text(json.dumps(config))
        (directory / "policy" / "trainer_state.json").write_text("{}")
        change_manifest(directory, lambda told: None)
        out = exported("--latest")
        names = everything(out)
        assert not {"model/trainer_state.json", "model/canary.json"} & set(names)
        for name in names:
            content = (out / name).read_bytes()
            for told in (str(tmp_path), "secret-place", str(Path.home()), address, "10.1.2.3", "MY_KEY"):
                assert told.encode() not in content, (name, told)
        assert "seeds.jsonl" in (out / "README.md").read_text()
        assert "judge-9b" in (out / "README.md").read_text()
        transformers.AutoModelForCausalLM.from_pretrained(out / "model")

    def test_hostile_text_stays_text(self, fake_run):
        change_recipe(fake_run, lambda told: told["data"].update(corpus=HOSTILE))
        for k in (1, 2):

            def change(told):
                counts = told["rows"]["quarantined"]
                reason = next(iter(counts))
                told["rows"]["quarantined"] = {HOSTILE: counts.pop(reason), **counts}
                told["metrics"]["pairs refused"] = {f"\n---\n# {HOSTILE}": 1}

            change_manifest(stage(fake_run, k, "label"), change)
        gated(
            fake_run, {1: decision("promote", 1, 1), 2: decision("promote", 2, 2, reasons=[HOSTILE, f"```\n{HOSTILE}"])}
        )
        out = exported()
        for card in (out / "README.md", out / "dataset" / "README.md"):
            page = rendered(card)
            assert not set(page.tags) & {"script", "img", "iframe"}
            assert all(link.startswith("https://arxiv.org/abs/") for link in page.links)
            assert "<script>alert(1)</script>" in page.text
            assert "[link](javascript:alert(2))" in page.text
            assert "\x1b" not in card.read_text()
            assert page.tags.count("h1") == 1

    def test_a_local_base_model_is_named_without_its_place(self, fake_run, tmp_path):
        change_recipe(fake_run, lambda told: told.update(model={"path": str(tmp_path / "nowhere" / "tiny-base")}))
        card = (exported() / "README.md").read_text()
        assert "the local model tiny-base" in card
        assert "nowhere" not in card
        assert "base_model" not in card
        assert "It is a toy" not in card

    def test_a_base_model_of_the_hub_is_linked_with_its_revision(self, fake_run):
        change_recipe(fake_run, lambda told: told.update(model={"path": "tiny/base"}))
        about = json.loads((fake_run / "run.json").read_text()) | {"revision": "0123abc"}
        (fake_run / "run.json").write_text(json.dumps(about))
        card = huggingface_hub.ModelCard.load(exported() / "README.md")
        assert card.data.base_model == "tiny/base"
        assert "tiny/base, revision 0123abc" in card.text

    def test_a_recipe_of_the_users_own_has_no_papers_but_its_losss(self, fake_run):
        change_recipe(fake_run, lambda told: told.update(name="mine"))
        card = huggingface_hub.ModelCard.load(exported() / "README.md")
        assert [tag for tag in card.data.tags if tag.startswith("arxiv:")] == ["arxiv:2405.14734"]
        assert "The shipped recipe" not in card.text


class TestRefusals:
    def test_an_unfinished_round(self, fake_run):
        shutil.rmtree(stage(fake_run, 2, "evaluate"))
        refused(1, "iter-002/5-evaluate of run 'fake' is not made yet", arguments=("--iteration", "2"))

    def test_a_round_that_the_recipe_does_not_have(self, fake_run):
        refused(1, "has no round 3", arguments=("--iteration", "3"))

    def test_a_directory_that_holds_something(self, fake_run):
        Path("out").mkdir()
        Path("out/mine.txt").write_text("mine")
        refused(1, "out is there already", "--out ANOTHER_DIRECTORY")

    def test_an_empty_directory_is_taken(self, fake_run):
        Path("out").mkdir()
        assert (exported() / "README.md").is_file()

    def test_a_place_inside_the_run(self, fake_run):
        refused(1, "inside the run", out="runs/fake/out")

    def test_a_link_out_of_the_run(self, fake_run, tmp_path):
        weights = stage(fake_run, 2, "train") / "policy" / "model.safetensors"
        shutil.move(weights, tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "elsewhere.safetensors")
        refused(1, "is a link to something outside the run", arguments=("--latest",))

    def test_weights_that_are_not_what_their_manifest_says(self, fake_run):
        weights = stage(fake_run, 2, "train") / "policy" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        refused(1, "differs from its manifest", "selfimprove verify fake", arguments=("--latest",))

    def test_a_disk_that_fills_up_leaves_nothing(self, fake_run, monkeypatch):
        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device", "x")

        monkeypatch.setattr("selfimprove.exporting.shutil.copyfile", full)
        refused(1, "No space left on device")

    def test_no_identifier_of_a_licence(self, fake_run):
        refused(2, "no identifier", arguments=("--license", "MIT: see\nbelow"))

    def test_public_goes_with_push(self, fake_run):
        refused(2, "--public goes with --push", arguments=("--public",))


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what it was asked, and what repositories there are."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.private: dict[tuple[str, str], bool] = {}
        self.fails: dict[str, Exception] = {}

    def __call__(self) -> "Hub":
        return self

    def __getattr__(self, name: str):
        if name not in ("whoami", "create_repo", "repo_info", "upload_folder", "upload_file"):
            raise AttributeError(name)

        def method(*arguments, **named):
            inspect.signature(getattr(REAL_API, name)).bind(self, *arguments, **named)  # the real one would take it
            if name in self.fails:
                raise self.fails[name]
            self.asked.append((name, {"repo_id": arguments[0] if arguments else None, **named}))
            where = (named.get("repo_type", ""), arguments[0] if arguments else "")
            if name == "create_repo":
                self.private.setdefault(where, named["private"])
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{where[1]}")
            if name == "repo_info":
                return type("Info", (), {"private": self.private[where]})()
            if name.startswith("upload") and "folder_path" in named:
                self.asked[-1][1]["files"] = everything(Path(named["folder_path"]))
            return None

        return method

    def uploads(self) -> list[dict]:
        return [named for name, named in self.asked if name.startswith("upload")]


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return found


class TestPush:
    def test_nothing_is_pushed_unasked(self, fake_run, hub):
        exported()
        assert hub.asked == []

    @pytest.mark.parametrize("public", [False, True])
    def test_model_and_pairs_go_to_repositories_that_are_private_unless_said_otherwise(self, fake_run, hub, public):
        result = selfimprove(
            "export", "fake", "--out", "out", "--latest", "--push", "me/tiny", *(["--public"] if public else [])
        )
        assert result.code == 0, result.err
        assert result.out.splitlines() == [
            "out", "https://huggingface.co/me/tiny", "https://huggingface.co/datasets/me/tiny",
        ]  # fmt: skip
        created = [named for name, named in hub.asked if name == "create_repo"]
        assert [(named["repo_type"], named["private"]) for named in created] == [
            ("model", not public),
            ("dataset", not public),
        ]
        model, card, pairs = hub.uploads()
        assert (model["repo_type"], card["repo_type"], pairs["repo_type"]) == ("model", "model", "dataset")
        assert "config.json" in model["files"]
        assert card["path_in_repo"] == "README.md"
        assert pairs["files"] == ["README.md", "data/round-001-00000.parquet", "data/round-002-00000.parquet"]
        told = huggingface_hub.ModelCard.load("out/README.md")
        assert told.data.datasets == ["me/tiny"]
        assert 'from_pretrained("me/tiny")' in told.text

    def test_a_public_repository_gets_nothing_that_should_be_private(self, fake_run, hub):
        hub.private["model", "me/tiny"] = False
        refused(1, "is there already and is public, not private", arguments=("--push", "me/tiny"))
        assert hub.uploads() == []

    @pytest.mark.parametrize(
        ("method", "error", "says"),
        [
            ("whoami", huggingface_hub.errors.OfflineModeIsEnabled(f"offline {TOKEN}"), "the hub is out of reach"),
            ("whoami", ConnectionError(TOKEN), "the hub is out of reach"),
            ("whoami", huggingface_hub.errors.LocalTokenNotFoundError(TOKEN), "nobody is logged in"),
        ],
    )
    def test_offline_it_is_refused_in_a_sentence_before_anything_is_written(self, fake_run, hub, method, error, says):
        hub.fails[method] = error
        refused(1, says, arguments=("--push", "me/tiny"))
        assert TOKEN not in selfimprove("export", "fake", "--out", "out", "--push", "me/tiny").err

    def test_a_hub_that_refuses_is_told_by_its_number_and_the_token_is_not(self, fake_run, hub):
        import httpx

        response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co/api"))
        hub.fails["create_repo"] = huggingface_hub.errors.HfHubHTTPError(f"Bearer {TOKEN}", response=response)
        result = selfimprove("export", "fake", "--out", "out", "--push", "me/tiny")
        assert result.code == 1
        assert "the hub refused me/tiny (HTTP 403)" in result.err
        assert TOKEN not in result.err + result.out

    def test_what_is_written_stays_when_the_upload_fails(self, fake_run, hub):
        hub.fails["upload_folder"] = ConnectionError()
        result = selfimprove("export", "fake", "--out", "out", "--push", "me/tiny")
        assert (result.code, result.out) == (1, "out\n")
        assert "the hub is out of reach" in result.err
        assert Path("out/model/model.safetensors").is_file()

    def test_no_name_of_a_repository(self, fake_run, hub):
        refused(2, "no name of a repository", arguments=("--push", "a/b/c"))

    def test_the_real_client_offline_is_refused_in_a_sentence(self, fake_run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        refused(1, "the hub is out of reach", arguments=("--push", "me/tiny"))
