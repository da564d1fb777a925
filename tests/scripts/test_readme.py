"""The README's figures are those of the result file."""

from __future__ import annotations

import json

from benchmarks.envelope import RESULTS, ROOT
from benchmarks.perplexity import markdown


def test_the_table_is_the_result_file() -> None:
    result = json.loads((RESULTS / "perplexity-smollm2.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown(result["rows"]) in readme
    assert result["command"] in readme
