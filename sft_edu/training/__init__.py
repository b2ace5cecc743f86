"""The SFT loop, its models, what a run leaves behind, and how well a model answers."""
