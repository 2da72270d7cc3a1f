"""Runs one task of lm-evaluation-harness; `lm_harness` starts it as a script, so that it imports nothing of ours.

Its arguments are two JSON files: what to run, and where to write what was found.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """What the harness finds: its figures, and the first metric of each prompt by the first filter."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=request["model"],
        model_args=request["model_args"],
        device=_device() if request["model"] == "hf" else None,
        tasks=[request["task"]],
        limit=request["limit"],
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_path=request["include_path"], include_defaults=False),
    )
    rows = found["samples"][request["task"]]
    first = rows[0]["filter"]
    figures = found["results"][request["task"]]
    return {
        "metric": f"{request['metric']},{first}",
        "metrics": {k: v for k, v in figures.items() if isinstance(v, int | float) and "," in k},
        "backend": request["model"],
        "version": lm_eval.__version__,
        "samples": [_row(row, request["metric"]) for row in rows if row["filter"] == first],
    }


def _device() -> str:
    """The harness takes a GPU for granted where nothing is said."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _row(row: dict[str, Any], metric: str) -> dict[str, Any]:
    score = row.get(metric)
    number = float(score) if isinstance(score, int | float) else None
    arguments = row["arguments"]
    first = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, dict) else arguments[0][0]
    return {
        "doc_id": row["doc_id"],
        "prompt": str(first),
        "text": _text(row["resps"]),
        "score": number,
        "reason": "" if number is not None else f"'{metric}' is no number of a prompt",
    }


def _text(responses: Any) -> str:
    """A generated text as it is; log-likelihoods as JSON."""
    while isinstance(responses, list) and len(responses) == 1:
        responses = responses[0]
    return responses if isinstance(responses, str) else json.dumps(responses, default=str)


if __name__ == "__main__":
    told = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(told), encoding="utf-8")
