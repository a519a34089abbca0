"""The tokenizer and the transformer, and the files that hold them."""
