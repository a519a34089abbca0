"""Training of the tokenizer and of the transformer: order of the data, schedules, checkpoints, loops."""
