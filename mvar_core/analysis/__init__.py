"""What a model costs, where its attention goes, and pictures of both."""
