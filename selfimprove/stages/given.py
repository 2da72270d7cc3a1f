"""The pairs that a recipe gives, as answers that a round labels: chosen first, rejected second."""

import random
from collections.abc import Callable, Iterator, Sequence

from selfimprove import data, recipe
from selfimprove.columns import batched
from selfimprove.judges import Candidate
from selfimprove.records import Given, Seed
from selfimprove.stages.answers import Window
from selfimprove.stages.io import StageIO

SOURCE = "given"
PAIRS = 512  # of a window


class Answers:
    """The answers of given pairs, as stages.answers has those of a policy.

    Args:
        pairs: those of the round.
        prompt_ids: the token ids of a prompt.
        completion_ids: the token ids of an answer to a prompt.
        progress: told what is done, and of how much.
    """

    def __init__(
        self,
        pairs: Sequence[Given],
        prompt_ids: Callable[[str], list[int]],
        completion_ids: Callable[[str, str], list[int]],
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self._pairs, self._prompt_ids, self._completion_ids = pairs, prompt_ids, completion_ids
        self._progress = progress
        self.golds = {one.prompt_id: Seed(one.prompt_id, one.prompt, None, one.source) for one in pairs}
        self.prompts, self.candidates = len(pairs), 2 * len(pairs)

    def windows(self, size: int = PAIRS) -> Iterator[Window]:
        """All answers in order, `size` pairs at a time."""
        done = 0
        for some in batched(self._pairs, size):
            found = [
                Candidate(
                    one.prompt_id, one.prompt, SOURCE, sample, text, self._completion_ids(one.prompt, text), "stop"
                )
                for one in some
                for sample, text in enumerate((one.chosen, one.rejected))
            ]
            yield Window(found, {one.prompt_id: self._prompt_ids(one.prompt) for one in some})
            done += len(some)
            self._progress("pairs", done, len(self._pairs))


def of_round(io: StageIO, section: recipe.Label) -> Answers:
    """The pairs that the stage label is given, as far as they are this round's."""
    pairs = share(data.read_pairs(io.inputs["pairs"]), section.quota, io.seed, io.iteration)
    return Answers(pairs, io.chat.prompt_ids, io.chat.completion_ids, io.progress)


def share(pairs: Sequence[Given], quota: int | None, seed: int, iteration: int) -> list[Given]:
    """The pairs of a round, in the order of the file: all of them, or as many as the quota that no other round has.

    Args:
        pairs: all that are given.
        quota: pairs of a round; None = each round has all.
        seed: of the run.
        iteration: the round's number, from 1.
    """
    if quota is None:
        return list(pairs)
    places = list(range(len(pairs)))
    random.Random(f"{seed}/given").shuffle(places)
    return [pairs[place] for place in sorted(places[quota * (iteration - 1) : quota * iteration])]
