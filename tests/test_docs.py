"""What README and docs/ name is there: imports, fields of a recipe, files that are linked to."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from transformer_lm.configs import base

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def test_imports_work(page):
    for line in re.findall(r"(?:^|`)((?:from|import) transformer_lm[\w. ]*)", page.read_text(), re.MULTILINE):
        exec(line, {})


def test_fields_exist(page):
    named = set(re.findall(r"--config\.(\w+)", page.read_text(), re.ASCII)) - {"field"}
    assert named <= set(base.get_config())


def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link
