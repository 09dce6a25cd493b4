import io
import time

from rich.console import Console

from leakjax.cli import progress as module


def shown(monkeypatch, seconds, *, terminal):
    monkeypatch.setattr(module, "EVERY", 0.05)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    with module.progress(console) as tell:
        tell("solving [bold]conv1")
        time.sleep(seconds)
    return text.getvalue()


def test_without_a_terminal_a_plain_line_says_every_so_often_what_is_done(monkeypatch):
    lines = shown(monkeypatch, 0.3, terminal=False).splitlines()
    assert len(lines) >= 2
    assert set(lines) == {"0 s: solving [bold]conv1"}


def test_what_ends_at_once_says_nothing(monkeypatch):
    assert shown(monkeypatch, 0.0, terminal=False) == ""


def test_on_a_terminal_one_line_changes(monkeypatch):
    found = shown(monkeypatch, 0.8, terminal=True)
    assert "solving [bold]conv1" in found
    assert "\x1b[" in found
