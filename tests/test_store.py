"""Artifacts are there whole or not at all; keys explain themselves; damage is found and named."""

import json

import pyarrow.parquet as pq
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from selfimprove import boundary, columns, records, store
from selfimprove.errors import UserError

PAIR = records.Pair(
    pair_id="i1/p/0",
    prompt=[{"role": "user", "content": "say \u00e4 \U0001f600"}],
    chosen=[{"role": "assistant", "content": ""}],
    rejected=[{"role": "assistant", "content": "b"}],
    prompt_id="p",
    iteration=1,
    chosen_source="current",
    rejected_source="initial",
    chosen_score=None,
    rejected_score=0.0,
    prompt_token_ids=[1, 2],
    chosen_token_ids=[],
    rejected_token_ids=[3],
)


def publish(directory, rows=(PAIR,)):
    artifact = store.Artifact(directory)
    artifact.begin()
    artifact.write_rows("pairs", records.Pair, rows)
    artifact.quarantine("q", "why", "because")
    artifact.contract("pair", len(rows) + 1, len(rows))
    return artifact.publish(1, "label", {"a": 1, "b": {"c": "x"}}, {})


def test_rows_come_back_as_they_went_in_with_unknown_still_unknown(tmp_path):
    manifest = publish(tmp_path / "3-label")
    assert store.read_rows(tmp_path / "3-label", "pairs", records.Pair) == [PAIR]
    assert manifest.rows.quarantined == {"why": 1}
    [set_aside] = store.read_rows(tmp_path / "3-label", "quarantine", records.Quarantined)
    assert set_aside == records.Quarantined("q", "why", "because")


def test_every_record_has_a_schema():
    for name in ("Prompt", "Generation", "Verdict", "Pair", "Sample", "Quarantined"):
        record = getattr(records, name)
        assert columns.arrow_schema(record).names == list(record.__struct_fields__)


def test_shards_split_and_join(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    rows = [replace(PAIR, pair_id=str(i)) for i in range(5)]
    publish(tmp_path / "x", rows)
    assert len(list((tmp_path / "x").glob("pairs-*.parquet"))) == 3
    assert store.read_rows(tmp_path / "x", "pairs", records.Pair) == rows


def test_nothing_is_published_before_the_manifest_is_written(tmp_path):
    artifact = store.Artifact(tmp_path / "x")
    artifact.begin()
    artifact.write_rows("pairs", records.Pair, [PAIR])
    assert not (tmp_path / "x").exists()
    assert store.read_manifest(tmp_path / "x") is None
    artifact.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_lost_row_is_an_error(tmp_path):
    artifact = store.Artifact(tmp_path / "x")
    artifact.begin()
    artifact.quarantine("a", "bad")
    with pytest.raises(pydantic.ValidationError, match=r"1 pair\(s\) neither came out nor were quarantined"):
        artifact.contract("pair", 3, 1)


def test_every_kind_of_damage_is_found_and_named(tmp_path):
    directory = tmp_path / "x"
    manifest = publish(directory)
    assert list(store.broken_outputs(directory, manifest)) == []
    for output in manifest.outputs:
        path = directory / output.path
        whole = path.read_bytes()
        for broken in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(broken)
            [sentence] = store.broken_outputs(directory, manifest)
            assert str(path) in sentence
        path.unlink()
        assert [f"{path} is missing"] == list(store.broken_outputs(directory, manifest))
        path.write_bytes(whole)
    (directory / "stray").write_text("")
    assert ["is not in its manifest" in s for s in store.broken_outputs(directory, manifest)] == [True]


def test_a_changed_ingredient_no_longer_fits_its_key(tmp_path):
    directory = tmp_path / "x"
    publish(directory)
    file = directory / "manifest.json"
    changed = json.loads(file.read_text())
    changed["ingredients"]["a"] = 2
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="seal"):
        store.read_manifest(directory)
    file.write_text(json.dumps(changed | {"seal": ""}))
    [sentence] = store.broken_outputs(directory, store.read_manifest(directory))
    assert "key" in sentence


def test_a_torn_manifest_is_one_sentence(tmp_path):
    run = tmp_path / "runs" / "r" / "iter-001" / "x"
    publish(run)
    (run / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        store.read_manifest(run)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_a_key_depends_on_content_not_on_order(ingredients):
    backwards = dict(reversed(list(ingredients.items())))
    assert store.key_of(ingredients) == store.key_of(backwards)
    assert store.key_of({**ingredients, "one more": 1}) != store.key_of(ingredients)


@given(st.integers(0, 2**31), st.integers(0, 99), st.text(max_size=8), st.text(max_size=8))
def test_row_seeds_fit_31_bits_and_differ_by_row(seed, iteration, stage, row):
    one = store.row_seed(seed, iteration, stage, row)
    assert 0 <= one < 2**31
    assert one == store.row_seed(seed, iteration, stage, row)
    assert one != store.row_seed(seed, iteration, stage, row + "x")


def test_a_second_writer_is_told_who_writes(tmp_path):
    (tmp_path / "r").mkdir()
    first, second = store.Run(tmp_path / "r"), store.Run(tmp_path / "r")
    with first.lock():
        first.write_state("running", 1, "2-generate")
        with pytest.raises(UserError, match="is being written by process"), second.lock():
            pass
    with second.lock():
        pass


def test_a_killed_writer_reads_as_stopped(tmp_path):
    run = store.Run(tmp_path)
    run.write_state("running", 1, "2-generate")
    assert run.read_state().state == "running"
    state = json.loads((tmp_path / "state.json").read_text()) | {"process_started": 1.0}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert run.read_state().state == "stopped"


def test_what_killed_writers_left_half_written_is_swept_and_whole_files_stay(tmp_path):
    cache = tmp_path / "cache" / "model"
    cache.mkdir(parents=True)
    for name in (".tmpAbCdEf", "1234.tmp", "1234.safetensors"):
        (cache / name).write_bytes(b"x")
    (tmp_path / ".best.tmp").symlink_to("iter-002")  # killed between making it and renaming it
    boundary.refuse_links(tmp_path)
    store.Run(tmp_path).sweep()
    assert [path.name for path in cache.iterdir()] == ["1234.safetensors"]
    assert not (tmp_path / ".best.tmp").is_symlink()


GROUPS = [replace(PAIR, pair_id=str(i), chosen_token_ids=list(range(i)), rejected_score=None) for i in range(23)]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 23), (3, 8), (7, 7), (6, 22), (22, 23), (9, None), (23, None)]
)
def test_any_part_of_the_rows_can_be_read_wherever_groups_and_shards_end(start, stop, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 9)
    monkeypatch.setattr(columns, "GROUP_ROWS", 4)
    publish(tmp_path / "x", GROUPS)
    files = [pq.ParquetFile(path) for path in sorted((tmp_path / "x").glob("pairs-*.parquet"))]
    assert [[f.metadata.row_group(k).num_rows for k in range(f.num_row_groups)] for f in files] == [
        [4, 4, 1],
        [4, 4, 1],
        [4, 1],
    ]
    assert list(store.iter_rows(tmp_path / "x", "pairs", records.Pair, start, stop)) == GROUPS[start:stop]


def test_columns_are_what_pyarrow_makes_of_them(tmp_path):
    """The reader against pyarrow's own, with nulls, empty lists and nested messages, and a file without a column."""
    rows = [PAIR, replace(PAIR, chosen_score=-0.5, prompt=[], source="a\U0001f600"), *GROUPS[:3]]
    publish(tmp_path / "x", rows)
    [path] = (tmp_path / "x").glob("pairs-*.parquet")
    assert pq.read_table(path).to_pylist() == [asdict(row) for row in rows]
    assert [columns.values(column.combine_chunks()) for column in pq.read_table(path).slice(1, 3).columns] == [
        column.to_pylist() for column in pq.read_table(path).slice(1, 3).columns
    ]
    pq.write_table(pq.read_table(path).drop_columns(["source"]), tmp_path / "old.parquet")
    [first, *_] = columns.read(tmp_path / "old.parquet", records.Pair, columns.arrow_schema(records.Pair))
    assert first == replace(PAIR, source=None)


def test_rows_of_two_kinds_and_quarantined_ones_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "GROUP_ROWS", 2)
    artifact = store.Artifact(tmp_path / "x")
    artifact.begin()
    with artifact.writer("pairs", records.Pair) as pairs, artifact.writer("prompts", records.Prompt) as prompts:
        for i in range(5):
            pairs.add(GROUPS[i])
            prompts.extend(records.Prompt(f"{i}/{k}", "x", "seed", 0, []) for k in range(i))
            artifact.quarantine(f"q{i}", "odd" if i % 2 else "even")
    artifact.contract("pair", 10, pairs.rows)
    manifest = artifact.publish(1, "x", {}, {})
    assert store.read_rows(tmp_path / "x", "pairs", records.Pair) == GROUPS[:5]
    assert [p.prompt_id for p in store.iter_rows(tmp_path / "x", "prompts", records.Prompt)] == [
        f"{i}/{k}" for i in range(5) for k in range(i)
    ]
    assert manifest.rows.quarantined == {"even": 3, "odd": 2}
    assert [q.row_id for q in store.iter_rows(tmp_path / "x", "quarantine", records.Quarantined)] == [
        f"q{i}" for i in range(5)
    ]


def test_a_shard_that_was_altered_is_refused_before_any_of_its_rows_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 9)
    publish(tmp_path / "x", GROUPS)
    second = tmp_path / "x/pairs-00001.parquet"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    seen = []
    with pytest.raises(UserError, match=r"pairs-00001\.parquet differs from its manifest"):
        seen.extend(row.pair_id for row in store.iter_rows(tmp_path / "x", "pairs", records.Pair))
    with pytest.raises(UserError, match="differs from its manifest"):
        list(store.iter_columns(tmp_path / "x", "pairs", ["pair_id"]))
    assert seen in ([], [str(i) for i in range(9)])
