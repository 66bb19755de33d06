"""The log of a run is one curve, however often the run was resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni.training.run.train_log import FILE, TrainLog, read_log


def test_the_log_is_one_curve_across_resumes(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    log = TrainLog(tmp_path, after=3, tensorboard=False)
    log.write({"step": 4, "loss": -4.0})
    log.close()
    assert [line["loss"] for line in read_log(tmp_path)] == [1.0, 2.0, 3.0, -4.0]
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl does not exist"):
        read_log(tmp_path / "absent")
