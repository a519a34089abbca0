"""Images and tokens: sources, views, batches, evaluation sets and the token cache."""
