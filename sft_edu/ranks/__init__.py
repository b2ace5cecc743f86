"""The same step on several ranks: real ones under torchrun, simulated ones, and what they cost."""
