"""Recipes are strict, complete on one page, and say what is wrong with them."""

import re

import pytest

from selfimprove import plan, preflight, recipe, recipe_file
from selfimprove.errors import UsageError, UserError

DEFAULT = recipe_file.find("default")
SHIPPED = recipe_file.shipped_recipes()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load_survive_a_round_trip_and_say_what_they_are(path, tmp_path):
    loaded = recipe_file.load(path)
    assert loaded.name == path.stem
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe_file.dump(loaded))
    assert recipe_file.load(copy) == loaded
    header = path.read_text().split("\n\n")[0]
    assert header.startswith(f"# {path.stem}: ")
    assert "selfimprove iterate" in header


def test_settings_override_any_key():
    changed = recipe_file.load(DEFAULT, ["train.optimizer.epochs=5", "model.path=some/where", "train.loss.beta=4"])
    assert changed.train.optimizer.epochs == 5
    assert changed.model.path == "some/where"
    assert changed.train.loss.model_extra["beta"] == 4
    assert changed.train.loss.model_extra["gamma"] == recipe_file.load(DEFAULT).train.loss.model_extra["gamma"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.optimizer.epochs=0", "train.optimizer.epochs: input should be greater than or equal to 1"),
        ("train.optimizer.epochs=two", "train.optimizer.epochs: input should be a valid integer"),
        ("train.optimizer.epoch=2", "train.optimizer.epoch: unknown key"),
        ("generate.n=true", "generate.n"),
        ("sythesize.n=3", "sythesize: unknown key"),
        ("genrate.n=3", "genrate: unknown key"),
        ("engine.kind=sglang", "engine.kind"),
        ('stages=["train","generate"]', "stages must stand once each in the order"),
        ('stages=["generate","label","train","evaluate"]', "stage 'synthesize' and section"),
        ("name=../x", "name"),
    ],
)
def test_what_is_wrong_is_named_with_a_hint(setting, says):
    with pytest.raises(UserError, match=r"recipe default\.toml") as raised:
        recipe_file.load(DEFAULT, [setting])
    assert says in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("setting", ["rounds", "=3", "a..b=1", "rounds.x.y=3"])
def test_a_setting_that_is_no_setting_is_a_usage_error(setting):
    with pytest.raises((UsageError, UserError)):
        recipe_file.load(DEFAULT, [setting])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"name = ", b"x" * 100, b"name = 3"])
def test_rubbish_is_one_sentence(tmp_path, content):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(UserError):
        recipe_file.load(file)
    with pytest.raises(UserError, match="cannot be read"):
        recipe_file.load(tmp_path / "none.toml")


def test_differences_leave_out_how_and_how_long():
    old = recipe_file.load(DEFAULT)
    assert recipe_file.differences(old, recipe_file.load(DEFAULT, ["rounds=9", "machine.threads=2"])) == []
    assert recipe_file.differences(old, recipe_file.load(DEFAULT, ["seed=3"])) == ["seed 0 -> 3"]


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError) as raised:
        recipe_file.find("sinpo")
    assert "synpo" in raised.value.hint


class TestSchedule:
    """Rounds may differ: DNPO begins as SPIN, SPIN raises its beta."""

    CHANGES = (
        '[{last = 1, set = {"label.pairing" = {name = "gold_vs_generated"}}, drop = ["label.judge", "train.noise"]}, '
        '{first = 3, set = {"train.loss.beta" = 5.0}}]'
    )

    def test_a_round_is_the_recipe_with_its_changes(self):
        chosen = recipe_file.load(recipe_file.find("dnpo"), [f"schedule={self.CHANGES}"])
        first, second, third = (chosen.at(t) for t in (1, 2, 3))
        assert (first.label.pairing.name, first.label.judge, first.train.noise) == ("gold_vs_generated", None, None)
        assert (second.label.pairing.name, second.label.judge) == (chosen.label.pairing.name, chosen.label.judge)
        assert second.train.loss == chosen.train.loss
        assert third.train.loss.model_extra["beta"] == 5.0
        assert chosen.at(4) == third

    def test_it_survives_the_copy_in_the_run(self, tmp_path):
        chosen = recipe_file.load(recipe_file.find("dnpo"), [f"schedule={self.CHANGES}"])
        (tmp_path / "recipe.toml").write_text(recipe_file.dump(chosen))
        assert recipe_file.load(tmp_path / "recipe.toml") == chosen

    def test_only_that_rounds_stages_get_another_section(self):
        chosen = recipe_file.load(recipe_file.find("dnpo"), [f"schedule={self.CHANGES}"])
        sections = {step.directory: step.section for step in plan.steps(chosen)}
        assert sections["iter-001/3-train"].noise is None
        assert sections["iter-002/3-train"].noise is not None
        assert sections["iter-001/1-generate"] == sections["iter-003/1-generate"]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ('{set = {"evaluate.n" = 8}}', "'evaluate.n' cannot change from round to round"),
            ('{set = {"model.path" = "x"}}', "'model.path' cannot change from round to round"),
            ('{drop = ["improve.n"]}', "'improve.n' cannot change from round to round"),
        ],
    )
    def test_what_cannot_change_is_refused(self, change, says):
        with pytest.raises(UserError, match=re.escape(says)):
            recipe_file.load(recipe_file.find("dnpo"), [f"schedule=[{change}]"])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ('{first = 2, set = {"train.optimizer.epochs" = 0}}', "schedule, round 2: train.optimizer.epochs"),
            ('{first = 2, set = {"train.lss" = 0}}', "schedule, round 2: train.lss: unknown key"),
            ('{first = 2, drop = ["label.judge"]}', "pairing 'dynamic' needs a judge"),
            ('{first = 2, set = {"train.loss" = {name = "nope"}}}', "unknown loss 'nope'"),
        ],
    )
    def test_a_change_is_checked_before_the_run(self, change, says):
        chosen = recipe_file.load(recipe_file.find("dnpo"), [f"schedule=[{change}]"])
        with pytest.raises(UserError, match=re.escape(says)):
            preflight.check(chosen)

    @pytest.mark.parametrize(
        ("drop", "says"),
        [
            ("train.nois", "a recipe has no such key"),
            ("train.optimizer.batchsize", "a recipe has no such key"),
            ("train.loss.bet", "the recipe has no such key"),
            ("servers.judge.price", "a recipe has no such key"),
        ],
    )
    def test_a_dropped_name_that_no_recipe_has_is_refused(self, drop, says):
        with pytest.raises(UserError, match=says):
            recipe.Edit(drop=[drop]).apply({"train": {"loss": {"name": "dpo", "beta": 0.1}}})

    def test_a_server_can_be_dropped(self):
        table = {"servers": {"judge": {"url": "u"}, "other": {"url": "v", "attempts": 2}}}
        recipe.Edit(drop=["servers.judge", "servers.other.attempts"]).apply(table)
        assert table == {"servers": {"other": {"url": "v"}}}

    def test_a_section_that_is_there_is_not_replaced_in_passing(self):
        table = {"train": {"loss": {"name": "dpo"}, "optimizer": {"epochs": 2}}}
        given = {"train": {"optimizer": {"epochs": 3}}}  # TOML's train.optimizer.epochs without quotes
        with pytest.raises(UserError, match=r"would replace the whole section \[train\]") as raised:
            recipe.Edit(set=given).apply(table)
        assert '"train.optimizer.epochs" = ...' in raised.value.hint
        recipe.Edit(drop=["train"], set=given).apply(table)
        assert table == given

    def test_rounds_that_end_before_they_begin_are_refused(self):
        with pytest.raises(UserError, match="last = 2 is before first = 3"):
            recipe_file.load(recipe_file.find("spin"), ['schedule=[{first=3, last=2, set={"generate.n"=2}}]'])

    def test_a_drop_may_name_what_is_not_there_and_not_go_through_a_list(self):
        table = {"train": {"loss": [{"name": "dpo"}]}}
        recipe.Edit(drop=["train.noise.scale", "label.judge"]).apply(table)
        with pytest.raises(UserError, match=r"'train\.loss' is no table"):
            recipe.Edit(drop=["train.loss.beta"]).apply(table)


def test_a_name_too_long_for_a_file_is_no_recipe():
    with pytest.raises(UserError, match="no recipe called"):
        recipe_file.find("x" * 5_000)


def test_a_name_alone_is_a_choice_without_parameters():
    whole, short = (
        recipe_file.load(recipe_file.find("spin"), [f"train.loss={loss}"]) for loss in ('{name="dpo"}', "dpo")
    )
    assert recipe_file.dump(whole) == recipe_file.dump(short)
    with pytest.raises(UserError, match=r"train\.loss: is no choice: a name, or"):
        recipe_file.load(recipe_file.find("spin"), ["train.loss=5"])
