"""Results of the quality benchmarks as tables, each with where its numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import quality_tables
from benchmarks.tables import Result, Row, source
from scripts.models import KNOWN

#: The result files of half a million tokens of calibration text.
ON_LONG_TEXT = " ".join(f"accuracy-{kind}-{model}" for kind in ("long", "code", "healed") for model in KNOWN)
#: Of the MLP weights, what 2:4 everywhere makes zero.
MAX_SPARSITY = 0.5


def of_quality(table: Callable[[Sequence[Row]], list[str]]) -> Callable[..., list[str]]:
    """A table of each model in results of the quality benchmarks, on texts that all have, and what those are."""

    def tables(result: Result, *others: Result) -> list[str]:
        rows, sources = quality_tables.renamed(result["rows"]), [source(result)]
        for other in others:
            rows, more = quality_tables.on_common_texts(rows, quality_tables.renamed(other["rows"]))
            rows += more
            sources += [source(other)] if more else []
        about = f"{quality_tables.measured_on(rows)}. {' '.join(sources)}"
        return [*quality_tables.of_each_model(rows, table), "", about]

    return tables


def headline(result: Result, *others: Result) -> list[str]:
    """What each method loses, without spreads and the methods that nobody should choose."""
    weak = ("spensegpt", "magnitude")
    kept = [
        row
        for row in result["rows"]
        if row["method"] not in weak and (row["method"] != "wanda" or row["sparsity"] == MAX_SPARSITY)
    ]
    return summary({**result, "rows": kept}, *others)


def over_models(result: Result, *others: Result) -> list[str]:
    """What methods lose on the average model."""
    rows = merged((result, *others))
    return [*quality_tables.over_models(rows), "", f"{quality_tables.measured_on(rows)}. {result['gpu']['name']}."]


def merged(results: Iterable[Result]) -> list[Row]:
    """Rows of several results: later ones add what earlier ones do not have, such as healed models."""
    rows: list[Row] = []
    for each in results:
        known = {_line(row) for row in rows}
        rows += [row for row in each["rows"] if _line(row) not in known]
    return rows


def _line(row: Row) -> tuple[object, ...]:
    return row["model"], quality_tables.label(row["method"]), row["sparsity"]


def over_models_tuned(result: Result, *others: Result) -> list[str]:
    """As `over_models`, of `spensegpt+` on docstrings and of `spensegpt++` with its default number of steps."""

    def kept(row: Row) -> bool:
        method, _, change = row["method"].partition(" ")
        if method == quality_tables.BASE:
            return not change
        return row["method"] == quality_tables.INT4 or (method == quality_tables.BETTER and "tune_steps" not in change)

    return over_models(*({**some, "rows": [*filter(kept, some["rows"])]} for some in (result, *others)))


quality = of_quality(quality_tables.markdown)
summary = of_quality(quality_tables.summary)
#: What tuning leaves of the losses without it.
gains = of_quality(quality_tables.gains)
#: What FP8 adds to BF16's losses.
rounding = of_quality(quality_tables.added_by_fp8)
#: Perplexity in both formats.
perplexity = of_quality(quality_tables.by_format)
#: What the rule for FP8 scales is worth.
fp8_scales = of_quality(quality_tables.rounding_errors)


def tasks(result: Result, *others: Result) -> list[str]:
    """Right answers of each model."""
    results = (result, *others)
    rows = [row for each in results for row in each["rows"]]
    return [*quality_tables.tasks(quality_tables.renamed(rows)), "", " ".join(source(each) for each in results)]
