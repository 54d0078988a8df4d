"""What a reward would do, from sampled groups alone: statistics of every signal, and a forecast. No training."""

from __future__ import annotations

from vigor.probe.forecast import Forecast, forecast
from vigor.probe.run import probe

__all__ = ["Forecast", "forecast", "probe"]
