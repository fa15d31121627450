"""Measuring a network: audits and their reports; queries decided; attacks alone, with witnesses, replay, transfer."""

from calipers.evaluate.audit import audit as audit
from calipers.evaluate.curve import Curve as Curve
from calipers.evaluate.curve import curve as curve
from calipers.evaluate.empirical import Empirical as Empirical
from calipers.evaluate.empirical import empirical as empirical
from calipers.evaluate.explain import explain as explain
from calipers.evaluate.replay import Replayed as Replayed
from calipers.evaluate.replay import replay as replay
from calipers.evaluate.replay import replay_assignment as replay_assignment
from calipers.evaluate.result import Audit as Audit
from calipers.evaluate.transfer import Transfer as Transfer
from calipers.evaluate.transfer import transfer as transfer
from calipers.evaluate.verify import Decision as Decision
from calipers.evaluate.verify import decide as decide
from calipers.evaluate.witnesses import Witnesses as Witnesses
from calipers.evaluate.witnesses import load_witnesses as load_witnesses
from calipers.evaluate.witnesses import save_witnesses as save_witnesses
