"""Measures of generated images: features, statistics, scores, and what makes them comparable to published ones."""
