"""Which token may see which (`rules`), how that is computed (`dense`), and the proof that nothing leaks (`guard`)."""

from aki.attention.dense import dense_mask, language_model_masks
from aki.attention.guard import LeakError, check_no_leak, reach
from aki.attention.rules import RULES, Rule, get_rule

__all__ = ["RULES", "LeakError", "Rule", "check_no_leak", "dense_mask", "get_rule", "language_model_masks", "reach"]
