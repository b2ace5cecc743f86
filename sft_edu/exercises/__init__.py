"""Checks for the learner's own answers: a verdict, and a hint where the mistake is a known one.

Every check compares with a result computed on the spot; none holds an answer. A cell that still contains `...` gets
the verdict "not started", so that an unsolved lesson runs from top to bottom. Whatever the answer does, a check raises
nothing but KeyboardInterrupt and leaves the process as `global_state.py` says. Code that never returns is not held up.
"""

from sft_edu.exercises.accumulation import check_accumulation_loop
from sft_edu.exercises.denominators import check_denominator
from sft_edu.exercises.log_probs import check_get_response_log_probs
from sft_edu.exercises.loss_by_hand import check_returned_loss
from sft_edu.exercises.masked_sum import check_masked_normalize
from sft_edu.exercises.mended_step import check_mended_step
from sft_edu.exercises.ranks import check_rank_loss
from sft_edu.exercises.response_mask import check_response_mask
from sft_edu.exercises.step import check_sft_microbatch_train_step
from sft_edu.exercises.training import check_training_loop
from sft_edu.exercises.verdict import Verdict

__all__ = [
    "Verdict",
    "check_accumulation_loop",
    "check_denominator",
    "check_get_response_log_probs",
    "check_masked_normalize",
    "check_mended_step",
    "check_rank_loss",
    "check_response_mask",
    "check_returned_loss",
    "check_sft_microbatch_train_step",
    "check_training_loop",
]
