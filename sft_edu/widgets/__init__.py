"""Widgets for the lessons: labs to drive by hand or from code, pictures with words, predictions."""

from sft_edu.widgets.figure import FigureView
from sft_edu.widgets.mask_lab import MaskLab
from sft_edu.widgets.prediction import Prediction
from sft_edu.widgets.step_lab import StepLab
from sft_edu.widgets.step_view import show_step

__all__ = ["FigureView", "MaskLab", "Prediction", "StepLab", "show_step"]
