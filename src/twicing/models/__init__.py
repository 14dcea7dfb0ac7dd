"""Models that recipes build."""
