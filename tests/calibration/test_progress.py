from swan.calibration import progress
from swan.calibration.progress import track


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(track([10, 20, 30, 40], "working")) == [10, 20, 30, 40]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["working: 2 of 4, 9 s"]
    assert list(track(iter("abc"), "working")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "working: 2, 9 s\n"


def test_quick_or_silent_work_says_nothing(capsys):
    assert list(track(range(3), "working")) == [0, 1, 2]
    assert list(track(range(3), "working", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
