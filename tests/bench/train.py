"""`make bench-train`: our training step beside TRL's DPOTrainer, with the same losses and gradients."""

import argparse
import json
import statistics
from pathlib import Path

from tests.bench import memory, workload
from tests.bench.apart import Worker
from tests.bench.measure import Result, baselines, best_batch, compare


def main() -> None:
    """Measure, print tables, write what OUT asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32768])
    given = parser.parse_args()
    entries = []
    with Worker(keeps_heap=False) as theirs, Worker(keeps_heap=True) as ours:
        for vocab in given.vocab:
            setting = workload.here(vocab)
            print(
                f"\nvocabulary {vocab:,}, {setting.device}, {setting.dtype}, {given.repeats} repetitions\n", flush=True
            )
            print(HEAD, flush=True)
            results = []
            for baseline in baselines(setting, every=vocab == EVERY_AT):
                results.append(compare(setting, baseline, given.repeats, theirs, ours))
                print(line(results[-1]), flush=True)
            if best := best_batch(results):
                results.append(best)
                print(line(best), flush=True)
            entries += [result.entry() for result in results]
            peaks = [peak / 1e9 for r in results for peak in r.peaks]
            print(f"\npeak of matrix products: {spread(peaks)} GFLOP/s\n")
            print(memory_table(setting), flush=True)
            if given.out:
                given.out.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


EVERY_AT = 1024  # the vocabulary at which TRL is also tried with other batch sizes, four responses and checkpointing
HEAD = (
    "| baseline | ratio: median (min .. max) | s / step: TRL, ours | pairs/s: TRL, ours | distinct tokens/s: TRL, ours "
    "| log-prob diff | gradient diff | loss diff | share of peak: TRL, ours (min .. max) | of the best peak |\n"
    + "|---" * 10
    + "|"
)


def line(result: Result) -> str:
    """One row of the table."""
    r = result
    theirs, ours = statistics.median(r.theirs), statistics.median(r.ours)
    share = statistics.median(s / x for s, x in zip(r.shares, r.ratios, strict=True))
    return (
        f"| {r.baseline.name} | {spread(r.ratios)} | {theirs:.3g}, {ours:.3g} "
        f"| {r.pairs / theirs:.3g}, {r.pairs / ours:.3g} | {r.tokens / theirs:,.0f}, {r.tokens / ours:,.0f} "
        f"| {r.max_logp_diff:.1e} | {r.grad_rel_diff:.1e} | {r.loss_diff:.1e} "
        f"| {share:.2f}, {spread(r.shares)} | {statistics.median(r.shares_of_best):.2f} |"
    )


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def memory_table(setting: workload.Setting) -> str:
    """Peak memory of all variants, and of ours at four times the global batch."""
    lines = ["| peak memory, MiB | pairs a step | before the steps | peak | working set |", "|---|---|---|---|---|"]
    larger = [(name, 4 * setting.pairs) for name in (memory.OURS, memory.KEPT)]
    for variant, pairs in [*((name, setting.pairs) for name in memory.VARIANTS), *larger]:
        found = memory.measure(variant, setting, pairs)
        lines.append(
            f"| {variant} | {pairs} | {found.before:,.0f} | {found.peak:,.0f} | {found.peak - found.before:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
