"""Ranks of a scheduler, and the board that they share."""

import functools
import operator
import threading
from pathlib import Path

import pytest

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.execution import board
from selfimprove.execution.ranks import Place, driver, rank_and_world
from tests.conftest import selfimprove


class TestRanks:
    @pytest.mark.parametrize(
        ("environ", "place"),
        [
            ({"RANK": "3", "WORLD_SIZE": "8"}, Place(3, 8)),
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, Place(0, 16)),
            ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "9"}, Place(1, 2)),
        ],
    )
    def test_what_the_scheduler_says(self, environ, place):
        assert rank_and_world(environ) == place

    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            ({}, "nothing says which rank"),
            ({"RANK": "1"}, "WORLD_SIZE=''"),
            ({"WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "RANK=''"),
            ({"RANK": "-1", "WORLD_SIZE": "4"}, "whole numbers"),
            ({"RANK": "1.0", "WORLD_SIZE": "4"}, "whole numbers"),
            ({"RANK": "4", "WORLD_SIZE": "4"}, "less than the number of ranks"),
            ({"RANK": "0", "WORLD_SIZE": "0"}, "less than the number of ranks"),
        ],
    )
    def test_nonsense_is_refused(self, environ, said):
        with pytest.raises(UserError, match=said):
            rank_and_world(environ)

    def test_one_rank_drives(self):
        assert driver({"RANK": "0", "WORLD_SIZE": "2"}).world == 2
        with pytest.raises(UserError, match="rank 1, and rank 0 alone drives"):
            driver({"RANK": "1", "WORLD_SIZE": "2"})


class TestCommands:
    def test_a_run_of_ranks_is_refused_before_it_begins(self, in_tmp, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("SLURM_PROCID", raising=False)
        done = selfimprove("iterate", "--engine", "fake", "--set", 'machine.executor="static"')
        assert (done.code, Path("runs").exists()) == (1, False)
        assert "nothing says which rank" in done.err

    def test_rank_0_does_not_follow(self, in_tmp, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert selfimprove("work", "r").code == 2

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"executor": "static", "workers": 2}, "the scheduler starts the ranks"),
            ({"ray_address": "auto"}, "ray_address goes with"),
        ],
    )
    def test_settings_that_do_not_go_together(self, settings, said):
        with pytest.raises(ValueError, match=said):
            recipe.Machine(**settings)


class TestBoard:
    SHARDS = tuple(f"{number:032x}" for number in range(40))

    def test_one_s_own_share_comes_first_and_then_the_last_of_others(self, tmp_path):
        for number, shard in enumerate(self.SHARDS[:6]):
            board.post(tmp_path, number, tmp_path, shard, number % 2)
        taken = []
        while one := board.take(tmp_path, 1):
            taken.append(one[0].number)
        assert taken == [1, 3, 5, 4, 2, 0]

    def test_each_shard_is_taken_by_one(self, tmp_path):
        for number, shard in enumerate(self.SHARDS):
            board.post(tmp_path, number, tmp_path / "shards", shard, number % 4)
        taken: list[list[str]] = [[], [], [], []]
        barrier = threading.Barrier(4)

        def work(rank: int) -> None:
            barrier.wait()
            while one := board.take(tmp_path, rank):
                assert one[1] == tmp_path / "shards"
                taken[rank].append(one[0].shard)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(functools.reduce(operator.iadd, taken, [])) == sorted(self.SHARDS)

    def test_what_is_given_back_can_be_taken(self, tmp_path):
        board.post(tmp_path, 0, tmp_path, self.SHARDS[0], 0)
        taken = board.take(tmp_path, 1)
        assert taken
        assert board.take(tmp_path, 0) is None
        board.give_back(taken[0], 1)
        assert [(one.rank, one.taken) for one in board.shown(tmp_path)] == [(1, False)]
        assert board.take(tmp_path, 0)

    def test_silence_ends_with_a_word(self, tmp_path, monkeypatch):
        monkeypatch.setattr(board, "BEAT", 0.05)
        voice = board.Voice(tmp_path / "rank-1", board.Report("s"))
        ear = board.Ear(tmp_path / "rank-1", board.Report)
        ear.hear()
        ear._since -= 100
        assert ear.silence > 99
        threading.Event().wait(0.3)
        heard = ear.hear()
        assert heard
        assert heard.beat > 0
        assert ear.silence < 1
        voice.close(remove=True)
        assert ear.hear() is None
