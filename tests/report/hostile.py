"""A run whose model, judge and servers tried to take over whoever looks at it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfimprove import store
from tests import altered

MARKUP = (
    '<script>window.owned = 1; document.title = "owned"</script>'
    '<img src="http://tracker.invalid/a.png" onerror="window.owned = 2">'
    '<svg onload="window.owned = 3"><animate onbegin="window.owned = 4" attributeName="x" dur="1s"/></svg>'
    '<iframe src="data:text/html,<script>parent.owned = 5</script>"></iframe>'
    '<link rel="stylesheet" href="http://tracker.invalid/a.css"><base href="http://tracker.invalid/">'
    '<meta http-equiv="refresh" content="0; url=http://tracker.invalid/">'
    '<a href="javascript:window.owned = 6" autofocus onfocus="window.owned = 7">here</a>'
    "<style>body { display: none } @import url(http://tracker.invalid/b.css);</style>"
    "<object data='http://tracker.invalid/o'></object><form action='http://tracker.invalid/f'><input autofocus>"
    '"\' onmouseover="window.owned = 8" x="</title></style></textarea></svg>--><!--]]></p></td></table></main>'
    "{{ 7 * 191 }} {% raw %} [bold]markup[/] [/] $x^2$ &amp; "
)
CODES = (
    "\x1b[2J\x1b[31mred\x1b[0m \x1b]8;;http://tracker.invalid/\x07link\x1b]8;;\x07 \x9b31mC1\x9b0m \x00\x07\x08\r\x7f "
    "\u202eevil\u202c \u2066isolated\u2069 zero\u200bwidth \ufeff\u00ad \U000e0041\U000e0042 \ue000 \u2028\u2029"
)
ACCENTS = "Z" + "\u0301\u0336" * 400
HUGE = "long " * 2_000 + "W" * 20_000
TEXTS = (MARKUP, CODES, ACCENTS, HUGE, MARKUP + CODES, "", " ", "\n\n", "plain words that stay")


def poison(run: Path) -> None:
    """Replace every text of every row, and every string of every JSON file that the report reads."""
    for shard in sorted(run.glob("iter-*/*/*.parquet")):
        table = pq.read_table(shard)
        if shard.name.startswith("quarantine"):
            continue
        for place, field in enumerate(table.schema):
            if field.name in ("text", "prompt", "reply", "reason", "chosen", "rejected"):
                table = table.set_column(place, field, pa.array(texts(table, field), field.type))
        pq.write_table(table, shard, compression="zstd")
    for path in run.glob("iter-*/*/audit.json"):
        write(path, evil(json.loads(path.read_text(encoding="utf-8"))))
    for number, directory in enumerate(sorted(run.glob("iter-00[1-9]")), 1):
        write(directory / "9-gate" / "gate.json", gate(number))
    for directory in {path.parent for path in run.glob("iter-*/*/manifest.json")}:
        republish(directory)


def texts(table: pa.Table, field: pa.Field) -> list[Any]:
    """One of TEXTS for each row; the same one for the same prompt in one column, another in the next round."""
    ids = table["prompt_id"].to_pylist() if "prompt_id" in table.column_names else list(range(table.num_rows))
    chosen = [TEXTS[(hash_of(str(i)) + hash_of(field.name) + table.num_rows) % len(TEXTS)] for i in ids]
    return [[{"role": "user", "content": text}] for text in chosen] if pa.types.is_list(field.type) else chosen


def hash_of(text: str) -> int:
    return int(store.key_of({"text": text})[:8], 16)


def evil(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: evil(of) for name, of in value.items()} | {MARKUP: 1, "extra" + CODES: {"value": CODES}}
    return MARKUP + CODES if isinstance(value, str) else value


def gate(number: int) -> dict[str, Any]:
    """A decision of each kind."""
    change = {"metric": "sampled", "difference": 0.1, "low": 0.05, "high": None, "level": 0.01, "mde": 0.07, "n": 40}
    return {
        "decision": ("promote", "keep", "roll back")[number % 3],
        "best": 1,
        "goes_on_from": number,
        "stop": number == 4,
        "reasons": [MARKUP, CODES, "A plain reason."],
        "primary": change,
        "guards": {"greedy": change},
        "health": {MARKUP: {"value": 0.4, "limit": 0.1, "ok": False}, "x": {"value": None, "limit": 1.0, "ok": None}},
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def republish(directory: Path) -> None:
    """Let the manifest say what is there now, its reasons for dropped rows being a model's words too."""
    path = directory / "manifest.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != path)
    told["outputs"] = [
        {"path": p.relative_to(directory).as_posix(), "bytes": p.stat().st_size, "sha256": store.sha256(p)}
        for p in files
    ]
    told["rows"]["quarantined"] = {MARKUP + CODES + reason: n for reason, n in told["rows"]["quarantined"].items()}
    altered.write_manifest(directory, told)
