"""A run whose judge is a server: it ends below the ceiling and goes on from there, and nothing is paid twice."""

from tests.conftest import SMALL, selfimprove
from tests.judges.misbehaving import COMPLETION_TOKENS, PROMPT_TOKENS, Server

PRICE = (PROMPT_TOKENS * 100 + COMPLETION_TOKENS * 1000) / 1e6  # USD of a reply


def command(server, ceiling):
    said = f"url='{server.url}', model='m', input_price=100.0, output_price=1000.0, ceiling_usd={ceiling}"
    return [
        "iterate", "--rounds", "1", "--run", "judged", "--engine", "fake", *SMALL,
        "--set", f"servers.s={{{said}}}",
        "--set", "label.judge={name='rubric', model='server:s', template='demo', max_tokens=8}",
    ]  # fmt: skip


def test_a_run_stops_below_the_ceiling_and_goes_on_from_it(in_tmp):
    def behave(handler, asked, number):
        handler.answer(asked, message={"content": f"Score: {len(asked.text) % 6}"})

    server = Server(behave)
    try:
        first = selfimprove(*command(server, 20 * PRICE))
        assert first.code == 1
        assert "servers.s.ceiling_usd in the run's recipe.toml" in first.err
        answered = sum(server.answered.values())
        assert 0 < answered <= 20
        again = selfimprove("resume", "judged")
        assert (again.code, sum(server.answered.values())) == (1, answered)
        recipe = in_tmp / "runs/judged/recipe.toml"
        text = recipe.read_text()
        assert f"ceiling_usd = {20 * PRICE}" in text
        recipe.write_text(text.replace(f"ceiling_usd = {20 * PRICE}", "ceiling_usd = 100.0"))
        more = selfimprove("resume", "judged")
        assert more.code == 0, more.err
        assert max(server.answered.values()) == 1
        assert sum(server.answered.values()) > answered
    finally:
        server.shutdown()
        server.server_close()
