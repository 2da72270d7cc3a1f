"""Nothing that a run reads can make it run code, leave its folder, or follow a link out of it."""

import ast
import json
import shutil
import signal
import time
from pathlib import Path

import jinja2
import pydantic
import pytest

from selfimprove import boundary, chat, models, recipe, recipe_file, store
from selfimprove import run as running
from selfimprove.data import SHIPPED
from selfimprove.errors import UserError
from selfimprove.judges import users
from tests.conftest import selfimprove
from tests.test_store import publish

PACKAGE = recipe.PACKAGE
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.save", "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}


def dangers(source: str) -> list[str]:
    """What in a program could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in UNSAFE_CALLS:
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle", "False") != "False":
            found.append(name)
        if name.endswith(("connection.send", "connection.recv", "_connection.send", "_connection.recv")):
            found.append(f"{name} (pickles)")
        if given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            found.append(f"{name} with shell or trust_remote_code")
        if name.endswith(".from_pretrained") and not safe(name, given):
            found.append(f"{name} may load a pickle or code")
    return found


def safe(name: str, given: dict[str | None, str]) -> bool:
    if "SAFE" in given.values():  # **SAFE
        return True
    if "GenerationConfig" in name or "PreTrainedTokenizerFast" in name:  # JSON alone
        return True
    if given.get("trust_remote_code") != "False":
        return False
    return "Tokenizer" in name or "Config" in name or given.get("use_safetensors") == "True"


def test_no_source_opens_pickles_or_runs_what_a_file_says():
    allowed = {"sandbox/harness.py": {"exec"}}  # the checked program itself, behind the walls of sandbox/
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        assert set(dangers(path.read_text(encoding="utf-8"))) <= allowed.get(name, set()), name


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(x)", "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)", "self.connection.send(x)", "connection.recv()", "run(x, shell=True)",
        "AutoModel.from_pretrained(x)", "AutoTokenizer.from_pretrained(x)", "f(trust_remote_code=True)", "eval(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
    ],
)  # fmt: skip
def test_that_search_finds_each_of_them(source):
    assert dangers(source)


def test_vllm_takes_safetensors_only_and_no_code():
    host = (PACKAGE / "engine/host.py").read_text()
    [call] = [n for n in ast.walk(ast.parse(host)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "vllm.LLM"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert (given["load_format"], given["trust_remote_code"]) == ("'safetensors'", "False")


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(SHIPPED["demo:model"], tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_model_of_pickles_is_refused_in_a_sentence(model, name):
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=f"no .safetensors weights, only {name}") as refused:
        models.locate_model(str(model))
    assert "save_pretrained" in refused.value.hint


def test_a_pickle_beside_other_safetensors_is_not_opened(model):
    from selfimprove.training.export import _load

    trap = model / "pytorch_model.bin"
    trap.write_bytes(b"cos\nsystem\n(S'touch TRAPPED'\ntR.")  # what pickle would run
    (model / "model.safetensors").rename(model / "adapter.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        _load(model)
    assert not Path("TRAPPED").exists()


def test_a_model_with_code_of_its_own_is_refused_and_its_code_is_not_run(model, in_tmp):
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("open('TRAPPED', 'w')\n")
    result = selfimprove("iterate", "--run", "r", "--engine", "fake", "--model", str(model))
    assert (result.code, result.err.count("Traceback")) == (1, 0)
    assert "needs code of its own (trust_remote_code), which is not run" in result.err
    assert not Path("runs/r").exists()
    assert not Path("TRAPPED").exists()


def test_code_beside_an_architecture_that_transformers_has_is_not_run(model, in_tmp):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    told = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(told | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (model / "own.py").write_text("open('TRAPPED', 'w')\n")
    from selfimprove.training.export import _load

    assert models.locate_model(str(model)) == model
    _load(model)
    chat.Chat(model)
    assert not Path("TRAPPED").exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/tmp/x", "-x", "", ".hidden", "a\0b", "a\n", "x/../../y"])
def test_no_name_of_a_run_leaves_the_folder_of_runs(in_tmp, name):
    assert not boundary.is_run_name(name)
    with pytest.raises(UserError):
        running.place(Path("runs"), name)
    (in_tmp / "recipe.toml").write_text((recipe.shipped("pipelines") / "default.toml").read_text())
    Path("runs").mkdir(exist_ok=True)
    for verb in ("status", "resume", "plan", "verify", "report", "gc", "gate"):
        result = selfimprove(verb, "--", name)
        assert result.code != 0
        assert "Traceback" not in result.err
    assert not list(Path("runs").iterdir())
    with pytest.raises(UserError):
        recipe_file.load(recipe.shipped("pipelines") / "default.toml", [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_a_manifest_cannot_name_files_outside_of_its_artifact(tmp_path, path):
    with pytest.raises(pydantic.ValidationError, match="outside"):
        store.Output(path=path, bytes=0, sha256="0")
    directory = tmp_path / "r" / "iter-001" / "3-label"
    directory.parent.mkdir(parents=True)
    publish(directory)
    told = json.loads((directory / "manifest.json").read_text())
    told["outputs"][0]["path"] = path
    (directory / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        store.read_manifest(directory)


@pytest.mark.parametrize(
    "where",
    ["iter-001", "iter-001/3-label", "iter-001/3-label/pairs-00000.parquet", "iter-003", "scratch", "cache", "logs",
     "aside", "iter-002/5-evaluate.partial", "receipts", "digests.json", "state.json.tmp"],
)  # fmt: skip
def test_a_run_with_a_link_in_it_is_neither_written_nor_collected_nor_set_aside(fake_run, tmp_path, where):
    outside, link = tmp_path / "outside", fake_run / where
    if link.exists():
        shutil.move(link, outside)
    elif where.endswith((".json", ".tmp")):
        outside.write_text("mine")
    else:
        outside.mkdir()
        (outside / "mine").write_text("mine")
    before = snapshot(outside)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    for command in (["gc", "fake", "--yes"], ["resume", "fake"]):
        result = selfimprove(*command)
        assert result.code == 1, (command, result.err)
        assert "is a symlink, which is not followed" in result.err or "not what this recipe makes" in result.err
    chosen = recipe_file.load(fake_run / "recipe.toml")
    with pytest.raises(UserError):
        running.set_aside(store.Run(fake_run), chosen, "iter-001/3-label")
    assert snapshot(outside) == before
    assert link.is_symlink()


def snapshot(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file): file.read_bytes() for file in files}


def test_verify_names_a_file_that_is_a_link(fake_run, tmp_path):
    pairs = fake_run / "iter-001/3-label/pairs-00000.parquet"
    shutil.move(pairs, tmp_path / "p")
    pairs.symlink_to(tmp_path / "p")
    result = selfimprove("verify", "fake")
    assert result.code == 3
    assert "pairs-00000.parquet is a symbolic link" in result.out


def test_a_run_on_another_disk_behind_a_link_to_its_whole_folder_works(fake_run, tmp_path):
    shutil.move(fake_run, tmp_path / "elsewhere")
    fake_run.symlink_to(tmp_path / "elsewhere")
    assert selfimprove("resume", "fake").code == 0
    assert selfimprove("gc", "fake", "--yes").code == 0


def test_a_small_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "state.json.tmp").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        store.write_atomically(tmp_path / "state.json", "{}")
    (tmp_path / "run.json").symlink_to(tmp_path / "outside")
    store.write_atomically(tmp_path / "run.json", "{}")  # takes the link's place
    assert not (tmp_path / "run.json").is_symlink()
    assert (tmp_path / "outside").read_text() == "mine"


def test_an_export_into_another_run_is_refused(fake_run):
    shutil.copytree(fake_run, fake_run.parent / "other", symlinks=True)
    result = selfimprove("export", "fake", "--out", "runs/other/iter-001/out")
    assert result.code == 1
    assert "is inside another run" in result.err


@pytest.mark.parametrize("function", ["os:system", "shutil:move", "subprocess:call", "builtins:exec", "mine:moved"])
def test_a_recipe_cannot_name_a_function_of_python_itself_as_a_checker(in_tmp, monkeypatch, function):
    Path("mine.py").write_text("from shutil import move as moved\n")
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    with pytest.raises(UserError, match="is a function of Python itself and no checker"):
        users.load(function)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "judge/../../x", "", "a//b"])
def test_a_template_is_a_file_of_the_folder_of_templates(name):
    with pytest.raises(UserError, match="cannot be a template's name"):
        chat.template_path(name)


def test_prompt_templates_are_sandboxed_and_strict():
    with pytest.raises(jinja2.sandbox.SecurityError):
        chat.TEMPLATES.from_string("{{ ''.__class__.__mro__ }}").render()
    with pytest.raises(jinja2.UndefinedError):
        chat.TEMPLATES.from_string("{{ nothing }}").render()


def with_template(model: Path, template: str) -> chat.Chat:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    return chat.Chat(model)


def test_a_chat_template_cannot_reach_python(model):
    found = with_template(model, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="chat template fails"):
        found.prompt_ids("x")


def test_a_chat_template_that_does_not_end_is_ended_and_other_timers_go_on(model, monkeypatch):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    found = with_template(model, loop)
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    began = time.monotonic()
    with pytest.raises(UserError, match="does not end within"):
        found.prompt_ids("x")
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) == before
    assert (timer == 0) == (signal.getitimer(signal.ITIMER_REAL)[0] == 0)
