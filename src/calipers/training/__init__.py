"""Training: objectives on either jaw of the bracket, the loop around them, and robust linear models."""

from __future__ import annotations

from calipers.training.logs import Status as Status
from calipers.training.loop import Trained as Trained
from calipers.training.loop import train as train
from calipers.training.measures import Measured as Measured
from calipers.training.measures import measure as measure
from calipers.training.run import Run as Run
