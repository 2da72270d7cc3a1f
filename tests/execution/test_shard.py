"""Shards: their names, and files that a kill has torn or a disk has altered."""

import random
import struct

import msgspec
import pytest

from selfimprove import recipe
from selfimprove.engine.protocol import Comparison, Completion, Request, Sampling
from selfimprove.errors import UserError
from selfimprove.execution import Lost, ask, asking, shard
from selfimprove.execution.shard import Answering, Shard, answers, asked, cut
from tests.executing import work

SAMPLING = Sampling(0.7, 0.9, 16, [2], ["\n"])
WORK = work("complete", SAMPLING)
ROWS = [Request([1, 5, k % 250 + 3], 2, k) for k in range(1000)]


def answer(k):
    return [Completion([k, 2], [-0.1 * k, -1.0], "stop"), Completion([k], [-1 / (k + 1)], "length")]


def parts(folder, name):
    return sorted(folder.glob(f"{name}.*.part"))


class TestNames:
    def test_a_shard_is_named_by_all_that_its_answers_depend_on(self):
        [*_, last] = cut(WORK, ROWS[:256])
        other = {
            "identity": "other weights",
            "sampling": Sampling(0.7, 0.9, 16, [2], []),
            "engine": recipe.Engine(kind="fake", max_model_len=256).model_dump(mode="json"),
        }
        names = {last.id}
        for name, value in other.items():
            [one] = cut(work("complete", **({"sampling": SAMPLING} | {name: value})), ROWS[:256])
            names.add(one.id)
        for rows in (ROWS[:255], ROWS[1:256], [*ROWS[:255], Request([1, 5, 3], 2, 255)], [*ROWS[:254], *ROWS[255:257]]):
            [one] = cut(WORK, rows)
            names.add(one.id)
        scored = [[1, 2, 3]] * 4
        names |= {next(cut(work(task), scored)).id for task in ("score", "reward")}
        assert len(names) == 10

    def test_and_by_no_place_on_this_machine(self):
        elsewhere = work("complete", SAMPLING, model="/elsewhere", policy="/there", logs="/logs")
        assert [one.id for one in cut(elsewhere, ROWS)] == [one.id for one in cut(WORK, ROWS)]

    @pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 2048, 2049, 16_384])
    def test_rows_are_cut_in_order_and_alike_whoever_carries_them_out(self, count):
        rows = [[k % 500, 1] for k in range(count)]
        shards = list(cut(work("score"), rows))
        assert [row for one in shards for row in one.rows] == rows
        sizes = [len(one.rows) for one in shards]
        assert all(size == sizes[0] for size in sizes[:-1])
        assert sizes[-1] <= sizes[0] <= shard.LARGEST
        assert len(shards) == 1 or sizes[0] >= shard.SMALLEST
        assert len(shards) <= shard.PARTS


class TestFiles:
    @pytest.mark.parametrize(
        ("task", "rows", "found"),
        [
            ("complete", ROWS[:3], [answer(0), Lost("it dies"), answer(2)]),
            ("score", [[1, 2], [3], [4, 5, 6]], [[-0.1], [], Lost("it dies")]),
            ("reward", [[1], [2], [3]], [0.1 + 0.2, Lost("it dies"), float("inf")]),
            ("compare", [("q", "a", "é\x00")] * 3, [Comparison(0.3, 0), Comparison(-1e-300, 7), Lost("it dies")]),
        ],
    )
    def test_questions_and_answers_of_every_kind_come_back_as_they_were(self, task, rows, found, tmp_path):
        ours = work(task, SAMPLING if task == "complete" else None)
        [one] = cut(ours, rows)
        shard.ask(tmp_path, ours, one)
        assert asked(tmp_path, one.id) == (ours, one)
        answering = Answering(tmp_path, one)
        for number in (2, 0, 1):
            answering.put(number, found[number])
        answering.finish()
        assert answers(tmp_path, ours, one) == found
        assert [path.name for path in tmp_path.iterdir()] == [f"{one.id}.done"]

    def test_a_question_that_was_left_with_paths_of_another_time_is_asked_with_those_of_now(self, tmp_path):
        [one] = cut(WORK, ROWS[:20])
        shard.ask(tmp_path, work("complete", SAMPLING, model="/gone"), one)
        shard.ask(tmp_path, WORK, one)
        assert asked(tmp_path, one.id) == (WORK, one)

    def test_a_torn_tail_costs_the_row_that_it_tore_and_no_other(self, tmp_path):
        one = Shard("x", ROWS[:50])
        answering = Answering(tmp_path, one)
        ends = []
        for k in range(50):
            answering.put(k, answer(k))
            [part] = parts(tmp_path, "x")
            ends.append(part.stat().st_size)  # each is in the file as soon as it is put
        whole = part.read_bytes()
        dice = random.Random(0)
        for size in [0, 1, *ends[:3], ends[0] + 1, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(60))]:
            part.write_bytes(whole[:size])
            known = Answering(tmp_path, one).known
            assert sorted(known) == list(range(sum(end <= size for end in ends)))
            assert all(msgspec.msgpack.decode(said, type=list[Completion]) == answer(k) for k, said in known.items())

    def test_a_flipped_bit_is_never_taken_for_an_answer(self, tmp_path, capsys):
        one = Shard("x", ROWS[:20])
        answering = Answering(tmp_path, one)
        for k in range(20):
            answering.put(k, answer(k))
        [part] = parts(tmp_path, "x")
        whole, dice = part.read_bytes(), random.Random(0)
        true = dict(answering.known)
        for _ in range(300):
            at = dice.randrange(len(whole))
            part.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
            known = Answering(tmp_path, one).known
            assert known.items() < true.items()
            assert sorted(known) == list(range(len(known)))  # those before it are kept
        part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        capsys.readouterr()
        assert len(Answering(tmp_path, one).known) == 19
        assert f"{part} is damaged" in capsys.readouterr().err

    def test_a_damaged_shard_is_removed_with_a_word_and_is_not_done(self, tmp_path, capsys):
        [one] = cut(WORK, ROWS[:20])
        dice = random.Random(0)
        path = tmp_path / f"{one.id}.done"
        for change in ("flip", "cut", "empty"):
            answering = Answering(tmp_path, one)
            for k in range(20):
                answering.put(k, answer(k))
            answering.finish()
            whole = path.read_bytes()
            at = dice.randrange(len(whole))
            changed = {"flip": whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :], "cut": whole[:at], "empty": b""}
            path.write_bytes(changed[change])
            assert answers(tmp_path, WORK, one) is None
            assert f"{one.id}.done is damaged: its rows are asked again" in capsys.readouterr().err
            assert not path.exists()

    def test_what_two_workers_left_is_united(self, tmp_path):
        one = Shard("x", ROWS[:10])
        first, second = Answering(tmp_path, one), Answering(tmp_path, one)
        for k in (0, 1, 2, 3):
            first.put(k, answer(k))
        for k in (3, 7, 8):
            second.put(k, answer(k))
        assert len(parts(tmp_path, "x")) == 2
        third = Answering(tmp_path, one)
        assert third.missing() == [4, 5, 6, 9]
        for k in third.missing():
            third.put(k, answer(k))
        third.finish()
        assert answers(tmp_path, WORK, one) == [answer(k) for k in range(10)]
        assert not parts(tmp_path, "x")
        first.put(9, answer(9))  # who is late may still write, and harms nothing
        first.close()
        assert answers(tmp_path, WORK, one) == [answer(k) for k in range(10)]

    def test_a_row_number_that_the_shard_does_not_have_is_ignored(self, tmp_path):
        answering = Answering(tmp_path, Shard("x", ROWS[:10]))
        answering.put(9, answer(9))
        answering.close()
        assert Answering(tmp_path, Shard("x", ROWS[:9])).known == {}

    def test_a_frame_that_promises_more_than_there_is(self, tmp_path):
        frame = struct.pack("<II", 0, 2**32 - 1)
        (tmp_path / "x.me.part").write_bytes(shard._digest(frame) + frame)
        assert Answering(tmp_path, Shard("x", ROWS[:1])).known == {}


def test_nothing_is_told_of_progress_before_a_row_ends(tmp_path):
    """Else the time that an engine takes to start is counted as that of the first row."""
    told = []
    [first] = cut(WORK, ROWS[:10])
    before = Answering(tmp_path, first)
    before.put(0, answer(0))
    before.close()

    class Slow:
        def map_shards(self, folder, work, shards, heard):
            for one in filter(None, shards):
                answering = Answering(folder, one)
                heard(one.id, len(answering.known))
                assert told == []
                for k in answering.missing():
                    answering.put(k, answer(k))
                    heard(one.id, len(answering.known))
                answering.finish()
                yield one.id

    assert list(asking.ask(Slow(), tmp_path, WORK, ROWS[:10], told.append)) == [answer(k) for k in range(10)]
    assert told == [*range(2, 11), 10]


class Instant:
    """An executor that answers at once, in an order of its own, and notes how many rows it has seen.

    So many files are damaged as soon as they are written, each once, or `always`.
    """

    def __init__(self, order=None, damage=0, always=False):
        self.order, self.damage, self.always, self.done, self.rows = order, damage, always, [], 0

    def map_shards(self, folder, work, shards, heard):
        taken = []
        for one in filter(None, shards):
            taken.append(one)
            if len(taken) == 3:
                yield from self.finish(folder, taken, heard)
                taken = []
        yield from self.finish(folder, taken, heard)

    def finish(self, folder, taken, heard):
        if self.order:
            self.order.shuffle(taken)
        for one in taken:
            answering = Answering(folder, one)
            for k, row in enumerate(one.rows):
                answering.put(k, [float(row[0])])
            answering.finish()
            if self.damage and (self.always or one.id not in self.done):
                self.damage -= 1
                (folder / f"{one.id}.done").write_bytes(b"damaged")
            self.done.append(one.id)
            self.rows += len(one.rows)
            heard(one.id, len(one.rows))
            yield one.id


@pytest.fixture
def windows(monkeypatch):
    """Small ones, so that there are many."""
    monkeypatch.setattr(shard, "WINDOW", 64)
    monkeypatch.setattr(shard, "SMALLEST", 8)


SEQUENCES = [[k, *[1] * (k * 7 % 13)] for k in range(1000)]
SCORES = [[float(k)] for k in range(1000)]


class TestAsking:
    @pytest.mark.parametrize("seed", range(3))
    def test_answers_come_in_the_order_of_the_rows_whatever_is_done_first(self, seed, tmp_path, windows):
        told = []
        executor = Instant(random.Random(seed))
        found = ask(executor, tmp_path, work("score"), SEQUENCES, told.append)
        assert list(found) == SCORES
        assert executor.rows == 1000
        assert told == sorted(told)
        assert told[-1] == 1000

    def test_no_more_is_read_ahead_than_a_window(self, tmp_path, windows):
        read = passed = most = 0

        def rows():
            nonlocal read
            for row in SEQUENCES:
                read += 1
                yield row

        for again in range(2):  # the second time, all was had
            executor = Instant()
            read = passed = 0
            for k, one in enumerate(ask(executor, tmp_path, work("score"), rows())):
                assert one == SCORES[k]
                passed += 1
                most = max(most, read - passed)
            assert (passed, executor.rows) == (1000, 0 if again else 1000)
        assert most <= 2 * shard.WINDOW

    def test_the_first_shard_waits_for_few_rows(self, tmp_path, windows, monkeypatch):
        monkeypatch.setattr(shard, "FIRST", 16)
        read = []

        class Noting(Instant):
            def map_shards(self, folder, work, shards, heard):
                def noted():
                    for one in filter(None, shards):
                        self.before.append(len(read))
                        yield one

                self.before = []
                yield from super().map_shards(folder, work, noted(), heard)

        executor = Noting()
        rows = (read.append(1) or row for row in SEQUENCES)
        assert list(ask(executor, tmp_path, work("score"), rows)) == SCORES
        assert sorted(set(executor.before))[:4] == [16, 16 + 32, 16 + 32 + 64, 16 + 32 + 64 + 64]

    def test_nothing_that_was_had_is_asked_again(self, tmp_path, windows):
        first = Instant()
        for k, _ in enumerate(ask(first, tmp_path, work("score"), SEQUENCES)):
            if k == 500:
                break
        second = Instant()
        assert list(ask(second, tmp_path, work("score"), SEQUENCES)) == SCORES
        assert not set(first.done) & set(second.done)
        assert first.rows + second.rows == 1000

    def test_the_same_rows_twice_are_asked_once(self, tmp_path, windows):
        executor = Instant()
        rows = SEQUENCES[:64] * 3
        assert list(ask(executor, tmp_path, work("score"), rows)) == SCORES[:64] * 3
        assert executor.rows == 64

    def test_a_file_that_is_damaged_once_is_asked_again_and_always_is_the_disk(self, tmp_path, windows, capsys):
        executor = Instant(damage=10)
        assert list(ask(executor, tmp_path / "a", work("score"), SEQUENCES[:300])) == SCORES[:300]
        assert executor.rows == 300 + 10 * 8
        with pytest.raises(UserError, match="is damaged each time") as raised:
            list(ask(Instant(damage=10**6, always=True), tmp_path / "b", work("score"), SEQUENCES[:300]))
        assert "disk" in raised.value.hint

    def test_no_rows_need_no_executor(self, tmp_path):
        assert list(ask(Instant(), tmp_path / "none", work("score"), [])) == []
        assert not (tmp_path / "none").exists()
