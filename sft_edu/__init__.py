"""The supervised fine-tuning microbatch step, taken apart.

Importing this imports torch and nothing else: no widgets, no plots. Those are in `sft_edu.widgets` and `sft_edu.plots`.
"""

from sft_edu.accumulate import accumulate, compare, full_batch_gradient, split_minibatch
from sft_edu.audit import audit_step
from sft_edu.audit.accumulation import audit_accumulation
from sft_edu.audit.accumulation_report import AccumulationAudit
from sft_edu.audit.report import StepAudit
from sft_edu.checks import PositiveLogProbWarning, raise_for_bad_values
from sft_edu.log_probs import compute_entropy, get_response_log_probs
from sft_edu.memory import saved_bytes
from sft_edu.model import TinyLM, default_device
from sft_edu.scaling import RULES, Rule
from sft_edu.step import masked_normalize, sft_microbatch_train_step
from sft_edu.tokens import ByteTokenizer, Tokenizer, tokenize_prompt_and_output, visible_token
from sft_edu.trace import Trace, no_tap

__all__ = [
    "RULES",
    "AccumulationAudit",
    "ByteTokenizer",
    "PositiveLogProbWarning",
    "Rule",
    "StepAudit",
    "TinyLM",
    "Tokenizer",
    "Trace",
    "accumulate",
    "audit_accumulation",
    "audit_step",
    "compare",
    "compute_entropy",
    "default_device",
    "full_batch_gradient",
    "get_response_log_probs",
    "masked_normalize",
    "no_tap",
    "raise_for_bad_values",
    "saved_bytes",
    "sft_microbatch_train_step",
    "split_minibatch",
    "tokenize_prompt_and_output",
    "visible_token",
]
