"""What is on disk: files that are whole or absent, hashes, images, resumable work."""
