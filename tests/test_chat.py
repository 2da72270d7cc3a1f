"""Templates and tokens: one BOS, the prompt a prefix, the end token trained, rubbish told."""

import json
import shutil

import pytest

from selfimprove import chat, data
from selfimprove.errors import UserError

MODEL = data.SHIPPED["demo:model"]


@pytest.fixture(scope="module")
def ours():
    return chat.Chat(MODEL)


def test_one_bos_the_prompt_is_a_prefix_and_the_completion_ends(ours):
    for seed in data.read_seeds(data.SHIPPED["demo:seeds"])[:100]:
        prompt, completion = ours.prompt_ids(seed.prompt), ours.completion_ids(seed.prompt, seed.completion)
        assert (prompt + completion).count(ours.tokenizer.bos_token_id) == 1
        assert completion[-1] == ours.tokenizer.eos_token_id
        assert ours.text(completion) == seed.completion


def with_template(tmp_path, template, **more):
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template, **more}))
    return chat.Chat(directory)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ loop.length }} {{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="prefix"):
        with_template(tmp_path, template).completion_ids("a", "b")


def test_a_second_bos_is_refused(tmp_path):
    template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="second BOS"):
        with_template(tmp_path, template).prompt_ids("a")


def test_a_template_keeps_what_transformers_gives_it_and_is_rendered_without_a_chain_of_maps(tmp_path):
    """The private function is where transformers keeps what it has compiled; without it all is slower and the same."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    refuses = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}"
    template = "{{ bos_token }}{{ strftime_now('x') }}" + refuses + "{{ messages[0].content }}"
    ours = with_template(tmp_path, template)
    assert ours.tokenizer.decode(ours.prompt_ids("a"), skip_special_tokens=True).strip() == "xa"
    assert type(_compile_jinja_template(template).globals) is dict
    with pytest.raises(UserError, match="no b"):
        ours.prompt_ids("b")


def test_what_follows_the_end_token_is_not_trained_and_a_missing_one_is_added(tmp_path):
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{{ eos_token }} and{% endfor %}"
    ours = with_template(tmp_path, template)
    assert ours.completion_ids("a", "fox")[-1] == ours.tokenizer.eos_token_id
    bare = with_template(tmp_path / "2", "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}")
    assert bare.completion_ids("a", "fox")[-1] == bare.tokenizer.eos_token_id


def test_templates_cannot_reach_python():
    import jinja2.exceptions

    with pytest.raises(jinja2.exceptions.SecurityError):
        chat.TEMPLATES.from_string("{{ ''.__class__.__mro__ }}").render()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<question> a b </question> <solution> c </solution>", "a b"),
        ("<question>a\nb</question>", "a\nb"),
        ("<question> a", None),
        ("", None),
        ("<question> a </question> <question> b </question>", "a"),
    ],
)
def test_tagged(text, found):
    assert chat.tagged(text, "question") == found


VALUES = {
    "synthesize": {"keywords": ["fox", "pen"]},
    "synthesize_answer": {"question": "the question", "solution": "the solution"},
    "improve": {"question": "the question", "answer": "the answer"},
    "judge/demo": {"question": "the question", "answer": "the answer"},
    "judge/demo_reply": {"score": 5},
    "judge/hundred": {"question": "the question", "answer": "the answer", "nonce": "the mark"},
    "judge/ten": {"question": "the question", "answer": "the answer", "nonce": "the mark"},
    "judge/additive": {"question": "the question", "answer": "the answer", "nonce": "the mark"},
    "judge/pairwise": {"question": "the question", "first": "the answer", "second": "the other", "nonce": "the mark"},
    "judge/pairwise_label": {"question": "the question", "first": "the one", "second": "the other", "nonce": "a mark"},
    "benchmark/gsm8k": {"question": "the question"},
    "benchmark/mt_bench": {
        "question": "the question",
        "earlier": [{"role": "user", "content": "before"}, {"role": "assistant", "content": "what was said"}],
        "reference": "the reference",
    },
}


class TestTemplates:
    def test_every_shipped_template_is_rendered_here(self):
        folder = chat.template_path("x").parent
        assert {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.jinja")} == set(VALUES)

    @pytest.mark.parametrize("name", VALUES)
    def test_it_uses_what_it_is_given(self, name):
        text = chat.render(name, VALUES[name])
        for value in VALUES[name].values():
            for piece in value if isinstance(value, list) else [str(value)]:
                assert all(part in text for part in (piece.values() if isinstance(piece, dict) else [piece]))
        assert "{" not in text.replace("{{", "")

    @pytest.mark.parametrize("name", VALUES)
    def test_a_missing_and_an_unused_variable_are_errors(self, name):
        values = dict(VALUES[name])
        with pytest.raises(UserError, match="does not use colour"):
            chat.render(name, {**values, "colour": "red"})
        missing = sorted(values)[0]
        del values[missing]
        with pytest.raises(UserError, match=f"uses {missing}, which is not given"):
            chat.render(name, values)

    def test_judged_text_is_not_a_template(self):
        text = chat.render("judge/demo", {"question": "{{ answer }}", "answer": "{% raw %}"})
        assert "{{ answer }}" in text
        assert "{% raw %}" in text
