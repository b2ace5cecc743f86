"""What a training step or loop really computes, anybody's: measured from its gradients."""

from sft_edu.audit.accumulation import audit_accumulation
from sft_edu.audit.accumulation_report import AccumulationAudit
from sft_edu.audit.report import StepAudit
from sft_edu.audit.step import audit_step

__all__ = ["AccumulationAudit", "StepAudit", "audit_accumulation", "audit_step"]
