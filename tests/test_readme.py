"""What the README says is so: its example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_trains():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (3, 10)
    assert names["logits"].isfinite().all()


def test_the_documents_it_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (Path(__file__).parent.parent / link).exists()]
    assert links and not missing
