"""Which token may see which (`rules`), which calls that takes (`segments`), the proof that nothing leaks (`guard`).

`unlock` brings all of it to any other model.
"""

from aki.attention.backends import prepare_attention
from aki.attention.choice import BACKENDS
from aki.attention.dense import dense_mask, language_model_masks
from aki.attention.families import CannotUnlock
from aki.attention.guard import LeakError, NothingOpensError, check_no_leak, reach
from aki.attention.rules import RULES, Rule, get_rule
from aki.attention.segments import Segment
from aki.attention.unlock import NothingOpensWarning, lock, unlock

__all__ = [
    "BACKENDS",
    "RULES",
    "CannotUnlock",
    "LeakError",
    "NothingOpensError",
    "NothingOpensWarning",
    "Rule",
    "Segment",
    "check_no_leak",
    "dense_mask",
    "get_rule",
    "language_model_masks",
    "lock",
    "prepare_attention",
    "reach",
    "unlock",
]
