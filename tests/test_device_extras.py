"""What is done around the rule on other devices: their code and tables, run on the host.

The tests of the CPU's kernels are run again, with plain CPU tensors standing for a device's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onepass
import places
import pytest
import snapshot
import test_averages
import test_ema_schedules
import test_skipping
from test_averages import *  # noqa: F403
from test_clearing import *  # noqa: F403
from test_clip_grad_norm import *  # noqa: F403
from test_clipping import *  # noqa: F403
from test_clipping_scaled import *  # noqa: F403
from test_ema_schedules import *  # noqa: F403
from test_ema_weights import *  # noqa: F403
from test_skipping import *  # noqa: F403

pytestmark = places.on_host


class Values(snapshot.Snapshot):
    """What a step that a device skips may not change: it is not known here, and versions count."""

    def look(self) -> dict[str, Any]:
        """Leave out versions and identities, and states that came with the step."""
        seen = super().look()
        known = seen["states"] if not hasattr(self, "now") else self.now["states"]
        states = {
            key: {name: (0, 0, seen["states"][key][name][2]) for name in own}
            for key, own in known.items()
        }
        return {**seen, "versions": None, "states": states}


@pytest.fixture(autouse=True)
def emulated(settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the host do what a device would."""
    monkeypatch.setattr(onepass.Extended, "may_have_states", True)
    for module in (test_averages, test_ema_schedules, test_skipping):
        monkeypatch.setattr(module, "Snapshot", Values)
    with places.emulated():
        yield
