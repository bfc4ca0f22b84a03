"""Who keeps the others waiting, once nothing has moved for too long; and what counts as a move."""

import os
import time

from jhessians.devices import place
from jhessians.devices.place import Place, Watcher
from jhessians.devices.stalls import Seen, stalled


def seen(place, *, heard=0.0, moved=0.0):
    found = Seen(place, heard)
    found.moved = moved
    return found


def said(*processes, now=100.0, seconds=60.0):
    return stalled(dict(enumerate(processes)), now, seconds, lambda index: f"P{index}")


WAITS = Place("Covariances", 12, 5, True)


def test_nobody_is_missing_while_one_moves():
    busy = seen(Place("Model", None, 9, False), heard=99, moved=50)
    assert said(seen(WAITS, heard=99), busy, seen(WAITS, heard=99)) is None
    assert said(seen(WAITS, heard=99), busy, seconds=49) is not None
    assert said(seen(WAITS), seconds=float("inf")) is None


def test_who_is_missing():
    silent = seen(Place("Covariances", 11, 4, False), heard=20)
    line = said(seen(WAITS, heard=99), silent, seen(WAITS, heard=99))
    assert "P1 is silent since Covariances, batch 11, 2 processes wait in Covariances, b" in line
    hanging = seen(Place("Model", None, 4, False), heard=99)
    line = said(seen(WAITS, heard=99), hanging)
    assert "P1 hangs in Model, P0 waits in Covariances, batch 12" in line
    behind = seen(Place("Covariances", 11, 4, True), heard=99)
    line = said(seen(WAITS, heard=99), behind, seen(WAITS, heard=99))
    assert "P1 waits in Covariances, batch 11, 2 processes wait in Covariances, batch 12" in line


def test_only_a_new_place_is_a_move():
    found = Seen(WAITS, 1.0)
    found.update(WAITS, 5.0)
    assert (found.heard, found.moved) == (5.0, 1.0)
    found.update(Place("Covariances", 13, 6, True), 7.0)
    assert (found.heard, found.moved) == (7.0, 7.0)


def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_work_is_a_move_and_waiting_is_none(tmp_path):
    watcher = Watcher()

    def moved(during):
        before = watcher.look().moves
        during()
        return watcher.look().moves > before

    assert not moved(lambda: time.sleep(0.5))
    assert moved(lambda: compute(0.2))
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    assert moved(lambda: (time.sleep(0.5), (tmp_path / "weights").read_bytes()))
    assert moved(place.move) and moved(lambda: place.enter("Model"))
    with place.waiting():  # a thread that waits for an accelerator keeps a processor busy
        assert not moved(lambda: compute(0.2)) and watcher.look().waits
    with place.waiting(computes=True):
        assert moved(lambda: compute(0.2))
    place.enter("Covariances")
    place.move(batch=3)
    assert str(watcher.look()) == "Covariances, batch 3" and not watcher.look().waits
    assert os.path.exists("/proc/self/io")
