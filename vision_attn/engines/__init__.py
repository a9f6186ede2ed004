"""What computes: attention by key sets (`union`, `flash`), cells, feature maps (`kernel`), rows, and caches."""
