"""Widgets for the lessons: labs to drive by hand or from code, pictures with words, predictions."""

from sft_edu.widgets.accumulation_lab import AccumulationLab
from sft_edu.widgets.answers import Answers
from sft_edu.widgets.bars import Bars
from sft_edu.widgets.curves import Curves
from sft_edu.widgets.figure import FigureView
from sft_edu.widgets.mask_lab import MaskLab
from sft_edu.widgets.optimizer_lab import OptimizerLab
from sft_edu.widgets.prediction import Prediction
from sft_edu.widgets.ranks_lab import RanksLab
from sft_edu.widgets.save_picture import SavePicture
from sft_edu.widgets.scaling_lab import ScalingLab
from sft_edu.widgets.stage_chain import StageChain
from sft_edu.widgets.start_page import StartPage
from sft_edu.widgets.step_lab import StepLab
from sft_edu.widgets.step_view import show_step
from sft_edu.widgets.token_mask import TokenMask
from sft_edu.widgets.training_lab import TrainingLab

__all__ = [
    "AccumulationLab",
    "Answers",
    "Bars",
    "Curves",
    "FigureView",
    "MaskLab",
    "OptimizerLab",
    "Prediction",
    "RanksLab",
    "SavePicture",
    "ScalingLab",
    "StageChain",
    "StartPage",
    "StepLab",
    "TokenMask",
    "TrainingLab",
    "show_step",
]
