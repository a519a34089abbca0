"""Class in, tokens out."""
