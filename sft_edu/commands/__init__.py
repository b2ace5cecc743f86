"""What `sft-edu` runs."""
