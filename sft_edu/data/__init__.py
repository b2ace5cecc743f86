"""What to train on: examples from files and tasks, and the way from them to token ids and masks."""
