"""One file a mechanism. Deleting a file removes the block everywhere."""
