"""The lessons as files, a learner's copy of them, and their progress."""
