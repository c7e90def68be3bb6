"""What docs/rewards.md shows runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


def test_the_examples_of_the_page_run():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) > 5
    for block in blocks:
        names.pop("output", None)
        exec(compile(block, str(PAGE), "exec"), names)
        if "output =" in block:
            assert names["output"].errors == [None], block
