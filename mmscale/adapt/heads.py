"""Task heads (in the making)."""
