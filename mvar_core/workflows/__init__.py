"""The functions of the public face, one file for each thing that mvar does."""
