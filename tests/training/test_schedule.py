from __future__ import annotations

import pytest
import torch
import transformers

from topwork.errors import ConfigError
from topwork.training.schedule import schedule

CASES = [
    ("linear", {}), ("cosine", {}), ("cosine", {"num_cycles": 0.75}),
    ("cosine_with_restarts", {"num_cycles": 3}), ("polynomial", {"power": 2.0}),
    ("constant", {}), ("constant_with_warmup", {}), ("inverse_sqrt", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_each_schedule_equals_the_peer(kind, options, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    given = {"lr_end": 0.0, **options} if kind == "polynomial" else options
    theirs = transformers.get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=20,
        scheduler_specific_kwargs=given,
    )  # fmt: skip
    ours = schedule(kind, 20, warmup, **options)
    for step in range(20):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-7), step
        optimizer.step()
        theirs.step()


def test_stable_decay_stays_and_falls():
    factor = schedule("warmup_stable_decay", 100, 10, num_decay_steps=20)
    assert [factor(s) for s in (5, 10, 79)] == [0.5, 1.0, 1.0]
    assert factor(90) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)


def test_an_option_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="num_cycle"):
        schedule("linear", 10, 0, num_cycle=2)
