"""The README's Python runs as written, and what it points to exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert any(event.status == "applied" for event in names["growth"].events)
    assert names["served"].serve(names["validation"][0][:3].astype("float32")).shape == (3, 10)
    assert (tmp_path / "digits.keras").is_file()
    printed = capsys.readouterr().out
    assert "hidden1" in printed
    assert "Results summary" in printed


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [target for target in targets if "://" not in target]
    assert local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
