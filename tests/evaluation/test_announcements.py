"""Slow work is announced, quick work is not."""

from __future__ import annotations

import threading

from swan.evaluation import announcements


def test_slow_work_is_announced(monkeypatch, capsys):
    with announcements.announced("quick work"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(announcements, "QUIET_SECONDS", 0.0)
    with announcements.announced("slow work"):
        threading.Event().wait(0.2)
    assert capsys.readouterr().err == "slow work ...\n"
